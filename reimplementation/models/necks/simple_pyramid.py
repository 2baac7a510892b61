"""The simple feature pyramid: from one map of a plain backbone to maps of several strides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of the layer norms


class SimpleFeaturePyramid(nn.Module):
    """Maps of several strides, all made from a backbone's last map (ViTDet, arXiv 2203.16527, section 3).

    Each level brings the map to its scale (transposed convolutions of stride 2, nothing, or max pooling), then to
    ``out_channels`` by a convolution of 1 x 1 and one of 3 x 3, each followed by a layer norm over channels. From a ViT
    with patches of 16 pixels the scales 4, 2, 1 and 1/2 make strides of 4, 8, 16 and 32: the four levels of a ResNet's
    pyramid.

    Args:
        in_channels: of the backbone's map; a multiple of 4 where there is a scale of 4, of 2 for a scale of 2.
        out_channels: of every level.
        scale_factors: of the levels, in the order that they are returned: of 4, 2, 1 and 0.5.

    Raises:
        ValueError: a scale is none of these, or the channels do not divide.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5)
    ):
        super().__init__()
        if unknown := [scale for scale in scale_factors if scale not in (4, 2, 1, 0.5)]:
            raise ValueError(f"scale_factors must be of 4, 2, 1 and 0.5; got {unknown}")
        if in_channels % (divisor := max(1, int(max(scale_factors, default=1)))):
            raise ValueError(f"in_channels must be a multiple of {divisor}, the largest scale; got {in_channels}")
        self.in_channels = in_channels
        self.scale_factors = tuple(scale_factors)
        self.levels = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scale_factors)

    def forward(self, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Make the levels.

        Args:
            features: (N, in_channels, H, W), or a sequence of that one map, as backbones return it. H and W are even
                where there is a scale of 0.5.

        Returns:
            A map (N, out_channels, scale * H, scale * W) for each scale.

        Raises:
            ValueError: the map does not fit, or there are several.
        """
        if not isinstance(features, Tensor):
            if len(features) != 1:
                raise ValueError(f"the pyramid is made from one map; got {len(features)}")
            (features,) = features
        if features.dim() != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"features must be (N, {self.in_channels}, H, W); got {tuple(features.shape)}")
        if 0.5 in self.scale_factors and (features.shape[2] % 2 or features.shape[3] % 2):
            raise ValueError(f"a scale of 0.5 needs an even height and width; got {tuple(features.shape[2:])}")
        return [level(features) for level in self.levels]


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (N, C, H, W), at each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normalised.permute(0, 3, 1, 2)


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    resampling, channels = _resampling(in_channels, scale)
    return nn.Sequential(
        *resampling,
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        ChannelNorm(out_channels, eps=EPS),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(out_channels, eps=EPS),
    )


def _resampling(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """What brings a map to a scale, and the channels that it has then: half as many for each doubling."""
    if scale == 4:
        half, quarter = channels // 2, channels // 4
        return [_doubling(channels), ChannelNorm(half, eps=EPS), nn.GELU(), _doubling(half)], quarter
    if scale == 2:
        return [_doubling(channels)], channels // 2
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2)], channels
    return [], channels


def _doubling(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
