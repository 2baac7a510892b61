"""Feature pyramid network (Lin et al., arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """A pyramid of equal channels, in which every level has seen the coarser ones.

    Each map is projected by a 1x1 convolution, the coarser levels are added from the top down (nearest neighbour), and
    a 3x3 convolution smooths each sum. Parameters have mmdetection's names (``lateral_convs.0.conv.weight``).

    Args:
        in_channels: channels of the maps, finest first.
        out_channels: channels of every level of the pyramid.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Convolution(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(Convolution(out_channels, out_channels, 3) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [(n, out_channels, H_i, W_i)] of maps [(n, in_channels[i], H_i, W_i)], finest first.

        Raises:
            ValueError: there are not as many maps as ``in_channels``.
        """
        if len(maps) != len(self.lateral_convs):
            raise ValueError(f"maps must hold {len(self.lateral_convs)} feature maps; got {len(maps)}")
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        for fine in range(len(levels) - 2, -1, -1):
            coarser = F.interpolate(levels[fine + 1], size=levels[fine].shape[-2:], mode="nearest")
            levels[fine] = levels[fine] + coarser
        return [smooth(level) for smooth, level in zip(self.fpn_convs, levels)]


class Convolution(nn.Module):
    """A convolution that keeps the size, held as ``conv`` for its parameters' names."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
