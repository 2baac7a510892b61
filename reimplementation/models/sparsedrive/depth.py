"""Dense depth, an auxiliary task in training that teaches the backbone geometry (Sparse4Dv2, arXiv 2305.14018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reimplementation.ops.autocast import without_autocast
from reimplementation.ops.dtypes import at_least_float32

from .losses import mean_over_ranks

REFERENCE_FOCAL = 100.0  # pixels: a camera of this focal length sees the depth that the network says


class DepthBranch(nn.Module):
    """One 1x1 convolution a level; nothing of it is needed to detect."""

    def __init__(self, embed_dims: int, num_levels: int):
        super().__init__()
        self.depth_layers = nn.ModuleList(nn.Conv2d(embed_dims, 1, kernel_size=1) for _ in range(num_levels))

    def forward(self, levels: Sequence[Tensor], focal: Tensor) -> list[Tensor]:
        """Depth maps.

        Args:
            levels: [(bs * num_cams, embed_dims, H, W)], finest first.
            focal: (bs, num_cams), focal lengths in pixels of the images that the network saw.

        Returns:
            [(bs, num_cams, H, W)] in metres, at least float32.
        """
        factor = focal[:, :, None, None] / REFERENCE_FOCAL
        depths = []
        for layer, level in zip(self.depth_layers, levels):
            with without_autocast(level.device):
                depth = layer(at_least_float32(level)).exp()
            depths.append(depth.unflatten(0, focal.shape).squeeze(2) * factor)
        return depths


def depth_loss(depths: Sequence[Tensor], targets: Sequence[Tensor], max_depth: float) -> Tensor:
    """Mean absolute error of depth maps where the lidar measured, in metres.

    Like the other losses it is divided by how many pixels a process of a distributed training has on average, so that
    the mean over the processes is the loss of all of the batch.

    Args:
        depths: [(bs, num_cams, H, W)], as predicted; beyond ``max_depth`` they count as ``max_depth``.
        targets: of the same shapes; 0 or less: not measured.
    """
    sums, counts = [], []
    for depth, target in zip(depths, targets):
        measured = target > 0
        error = (depth.clamp(max=max_depth) - target).abs()
        sums.append(torch.where(measured, error, 0).sum())
        counts.append(measured.sum())
    return (torch.stack(sums) / mean_over_ranks(torch.stack(counts))).mean()
