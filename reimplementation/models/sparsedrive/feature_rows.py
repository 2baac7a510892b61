"""Feature maps as the aggregation reads them, formatted once for all layers of both heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reimplementation import ops


class FeatureRows:
    """`ops.feature_maps_format` that keeps the levels' shapes and first rows on the device.

    They only depend on the images' size. Sent to the GPU once, they cost no copy a frame, and a captured CUDA graph
    finds them where they were. Maps in channels-last memory are concatenated as they lie.
    """

    def __init__(self):
        self._levels: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, levels: Sequence[Tensor], num_cams: int) -> list[Tensor]:
        """``[col_feats, spatial_shape, scale_start_index]`` of levels [(bs * num_cams, C, H, W)], finest first."""
        maps = [level.unflatten(0, (-1, num_cams)) for level in levels]
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return ops.feature_maps_format(maps)
        key = (levels[0].device, num_cams, *(tuple(level.shape[-2:]) for level in levels))
        if key not in self._levels:
            self._levels[key] = tuple(ops.feature_maps_format(maps)[1:])
        rows = torch.cat([level.flatten(3).transpose(2, 3) for level in maps], dim=2).flatten(1, 2)
        return [rows, *self._levels[key]]

    def __getstate__(self) -> dict:
        return {"_levels": {}}  # a copy of the model, or one in another process, has a device of its own
