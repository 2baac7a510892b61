"""Between a list of feature maps per level and the one row-major tensor that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .checks import check_dtype, check_shape
from .dtypes import INTEGER


def feature_maps_format(feature_maps: Sequence, inverse: bool = False) -> list:
    """Lay feature maps out as rows of channels, camera by camera and level by level, or undo that.

    Args:
        feature_maps: a list of (bs, num_cams, C, H, W) tensors, one per level; or, for cameras of different
            shapes, a list of such lists, one per group of cameras. With ``inverse=True`` the list
            ``[col_feats, spatial_shape, scale_start_index]`` that this function returned.
        inverse: go back to feature maps.

    Returns:
        ``[col_feats, spatial_shape, scale_start_index]``: (bs, num_feat, C) in the maps' dtype;
        (num_cams, num_levels, 2) int64 (H, W); (num_cams, num_levels) int64 first row of each level. The two
        integer tensors lie on the maps' device.

        With ``inverse=True`` a list of groups of cameras, each a list of (bs, cameras of the group, C, H, W) views of
        ``col_feats``, one per level: ``[0][-1]`` is the last level of the first group. Neighbouring cameras of equal
        shapes form one group. SparseDrive nests its maps alike, and this function takes the list back.

    Raises:
        ValueError: the list is empty, or the maps' batch sizes, cameras or channels differ; with ``inverse=True`` the
            three do not describe each other.
        TypeError: these are no lists, or an entry is not a tensor.
    """
    if not isinstance(feature_maps, (list, tuple)):
        raise TypeError(f"feature_maps must be a list of maps, one per level; got {type(feature_maps).__name__}")
    if inverse:
        if len(feature_maps) != 3:
            raise ValueError(
                "feature_maps must be [col_feats, spatial_shape, scale_start_index] with inverse=True; "
                f"got a list of {len(feature_maps)}"
            )
        return _split(*feature_maps)
    if len(feature_maps) == 0:
        raise ValueError("feature_maps must hold at least one level; got an empty list")
    groups = feature_maps if isinstance(feature_maps[0], (list, tuple)) else [feature_maps]
    for group in groups:
        _check_group(group, groups[0])

    blocks = [torch.cat([level.flatten(3).transpose(2, 3) for level in group], dim=2).flatten(1, 2) for group in groups]
    rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    shapes = [[tuple(level.shape[-2:]) for level in group] for group in groups for _ in range(group[0].shape[1])]
    starts, _ = _first_rows(shapes)
    device = rows.device
    return [rows, _integers(shapes, device), _integers(starts, device)]


def read_integers(tensor: Tensor) -> list:
    """What ``tolist`` returns: numbers, or symbols in their place where an export to ONNX does not know them."""
    return getattr(tensor, "numbers", None) or tensor.tolist()


def _first_rows(shapes: Sequence) -> tuple[list[list[int]], int]:
    """The first row of every level of every camera, and the number of all rows."""
    starts: list[list[int]] = []
    end = 0
    for camera in shapes:
        starts.append([])
        for height, width in camera:
            starts[-1].append(end)
            end = end + height * width  # no `+=`: under `torch.jit.trace` this is a tensor, and the list holds it
    return starts, end


def _integers(numbers: list, device: torch.device) -> Tensor:
    tensor = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
    if torch.onnx.is_in_onnx_export():
        # For `read_integers`: the exporter hides the values of its tensors.
        tensor.numbers = numbers  # type: ignore[attr-defined]
    return tensor


def _check_group(group: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    """Every level of a group has the group's cameras, and every group the same batch, levels and channels."""
    for level in group:
        if not isinstance(level, Tensor):
            raise TypeError(f"feature_maps must hold torch.Tensor levels; got {type(level).__name__}")
    if len(group) != len(first):
        raise ValueError(f"feature_maps: every group must have num_levels={len(first)} levels; got {len(group)}")
    for level in group:
        bs, num_cams, channels = first[0].shape[0], group[0].shape[1], first[0].shape[2]
        if level.dim() != 5 or (level.shape[0], level.shape[1], level.shape[2]) != (bs, num_cams, channels):
            raise ValueError(
                "feature_maps: each level must be (bs, num_cams, C, H, W) "
                f"with bs={bs}, num_cams={num_cams}, C={channels}; got {tuple(level.shape)}"
            )


def _split(col_feats: Tensor, spatial_shape: Tensor, scale_start_index: Tensor) -> list:
    """The inverse: slices of the rows, viewed as images; cameras of equal shapes side by side."""
    check_shape("col_feats", col_feats, ("bs", "num_feat", "C"), {})
    check_dtype("spatial_shape", spatial_shape, INTEGER)
    check_shape("spatial_shape", spatial_shape, ("num_cams", "num_levels", 2), {})
    shapes = [tuple(map(tuple, camera)) for camera in spatial_shape.tolist()]
    if any(size < 0 for camera in shapes for level in camera for size in level):
        raise ValueError(f"spatial_shape must hold heights and widths of at least 0; got {spatial_shape.tolist()}")
    starts, num_rows = _first_rows(shapes)
    if num_rows != col_feats.shape[1]:
        raise ValueError(
            f"spatial_shape must describe all num_feat={col_feats.shape[1]} rows of col_feats; got {num_rows} rows"
        )
    if scale_start_index.tolist() != starts:
        raise ValueError(
            "scale_start_index must count the rows of all levels, camera by camera: "
            f"expected {starts}; got {scale_start_index.tolist()}"
        )
    groups, end = [], 0
    for camera, members in groupby(shapes):
        num_cams = len(list(members))
        start, end = end, end + num_cams * sum(height * width for height, width in camera)
        rows = col_feats[:, start:end].unflatten(1, (num_cams, -1))
        levels = rows.split([height * width for height, width in camera], dim=2)
        groups.append([level.unflatten(2, shape).permute(0, 1, 4, 2, 3) for level, shape in zip(levels, camera)])
    return groups
