"""ResNet (He et al., arXiv 1512.03385) as a backbone: the four stages' feature maps, no classifier.

Parameters have torchvision's names, so that its ImageNet weights load (less ``fc``). As there, a bottleneck strides in
its 3x3 convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from reimplementation.models.plain import calls_are_unseen, is_plain

CUDNN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDNN_CHANNELS = 8  # cuDNN fuses convolutions of channels in multiples of this


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added: ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = _activated(self.conv1, self.bn1, x)
        return _activated(self.conv2, self.bn2, x, identity)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, around which the input is added: ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _convolution(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _convolution(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = _activated(self.conv1, self.bn1, x)
        x = _activated(self.conv2, self.bn2, x)
        return _activated(self.conv3, self.bn3, x, identity)


Block = BasicBlock | Bottleneck
ARCHITECTURES: dict[int, tuple[type[Block], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
WIDTHS = (64, 128, 256, 512)


class ResNet(nn.Module):
    """The feature maps of the four stages, at strides 4, 8, 16 and 32.

    Args:
        depth: 18, 34, 50 or 101.

    Attributes:
        out_channels: channels of the four maps.

    Raises:
        ValueError: there is no ResNet of this depth here.
    """

    def __init__(self, depth: int = 50):
        super().__init__()
        if depth not in ARCHITECTURES:
            raise ValueError(f"depth must be one of {', '.join(map(str, ARCHITECTURES))}; got {depth!r}")
        block, counts = ARCHITECTURES[depth]
        self.out_channels = tuple(width * block.expansion for width in WIDTHS)
        self.conv1 = _convolution(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = (64, *self.out_channels[:-1])
        self.layer1 = _stage(block, in_channels[0], WIDTHS[0], counts[0], stride=1)
        self.layer2 = _stage(block, in_channels[1], WIDTHS[1], counts[1], stride=2)
        self.layer3 = _stage(block, in_channels[2], WIDTHS[2], counts[2], stride=2)
        self.layer4 = _stage(block, in_channels[3], WIDTHS[3], counts[3], stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps [(n, out_channels[i], ceil(H / 2 ** (i + 2)), ...)] of normalised images (n, 3, H, W)."""
        x = _activated(self.conv1, self.bn1, images)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def fold_norms(self) -> None:
        """Fold every normalisation into the convolution before it: the same maps from half as many kernels.

        This is for inference, after a checkpoint was loaded: no normalisation is left whose names one could have. On a
        GPU cuDNN then does a convolution with its bias, its sum and its ReLU in one kernel, without autocast.

        Raises:
            RuntimeError: the backbone is in training, where the normalisation depends on the batch.
        """
        if self.training:
            raise RuntimeError("fold_norms is for inference; call eval() first")
        for module in list(self.modules()):
            for convolution, norm in _pairs(module):
                folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, folded)
                setattr(module, norm, nn.Identity())


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """The names of a module's convolutions, each with that of the norm behind it; none once they are folded."""
    names = [name for name, child in module.named_children() if isinstance(child, (nn.Conv2d, nn.BatchNorm2d))]
    pairs = zip(names[::2], names[1::2])
    return [(convolution, norm) for convolution, norm in pairs if isinstance(getattr(module, norm), nn.BatchNorm2d)]


def _activated(convolution: nn.Conv2d, norm: nn.Module, x: Tensor, identity: Tensor | None = None) -> Tensor:
    """The ReLU of a normalised convolution, and of an identity that is added to it."""
    if _cudnn_fuses(convolution, norm, x):
        settings: Any = (
            convolution.bias,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
        )
        if identity is None:
            return torch.cudnn_convolution_relu(x, convolution.weight, *settings)
        return torch.cudnn_convolution_add_relu(x, convolution.weight, identity, 1.0, *settings)
    x = norm(convolution(x))
    return F.relu(x if identity is None else x + identity, inplace=True)


def _cudnn_fuses(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> bool:
    """Whether nobody could tell that the layers are not called, and cuDNN has a kernel for all of them together."""
    if not x.is_cuda or type(norm) is not nn.Identity or torch.is_grad_enabled() or torch.version.hip is not None:
        return False
    fits = convolution.in_channels % CUDNN_CHANNELS == 0 and x.dtype in CUDNN_DTYPES
    is_called_alone = calls_are_unseen() and is_plain(convolution, nn.Conv2d) and not torch.is_autocast_enabled("cuda")
    return fits and is_called_alone and convolution.bias is not None and torch.backends.cudnn.is_available()


def _stage(block: type[Block], in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(count - 1)))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A projection of the input where the block changes its shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, which the normalisation behind it would cancel; He initialisation (arXiv 1502.01852)."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
