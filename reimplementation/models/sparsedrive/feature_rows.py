"""Feature maps as the aggregation reads them, formatted once for all layers of both heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.ops.backends import constant_in_graphs


def feature_rows(levels: Sequence[Tensor], num_cams: int) -> list[Tensor]:
    """What `ops.feature_maps_format` returns, without its copy of the levels' shapes to the device in every frame.

    Maps in channels-last memory are concatenated as they lie.

    Args:
        levels: [(bs * num_cams, C, H, W)], finest first.
        num_cams: cameras.
    """
    maps = [level.unflatten(0, (-1, num_cams)) for level in levels]
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return ops.feature_maps_format(maps)
    rows = torch.cat([level.flatten(3).transpose(2, 3) for level in maps], dim=2).flatten(1, 2)
    shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
    return [rows, *_level_table(shapes, num_cams, rows.device)]


@constant_in_graphs
def _level_table(shapes: tuple[tuple[int, int], ...], num_cams: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels' shapes and first rows, which the images' size decides: a compiled or captured graph holds them."""
    return _made_once(shapes, num_cams, device)


@functools.lru_cache(maxsize=64)
def _made_once(shapes: tuple[tuple[int, int], ...], num_cams: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what a first frame in that mode leaves can still be trained with
        maps = [torch.empty(1, num_cams, 0, *shape, device=device) for shape in shapes]
        _, spatial_shape, scale_start_index = ops.feature_maps_format(maps)
    return spatial_shape, scale_start_index
