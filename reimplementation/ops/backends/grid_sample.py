"""Both ops in plain PyTorch: the fallback, the reference, and what becomes of them in ONNX.

Differentiable by autograd and written level by level, so that the sampled features of one level, never of all of them,
are alive at a time in the forward.

The shapes of the levels are Python numbers here. Where PyTorch traces they are unknown: `gather` takes over. An export
to ONNX stays, for ONNX has a GridSample whose image may have any size: shapes that it does not know are symbols, and
such a level is taken to fit its rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feature_maps import read_integers
from ..levels import lies_within
from . import gather
from .gather import nothing

OUTSIDE = -2.0  # a location far enough outside that its footprint touches no pixel


def deformable_aggregation(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """`reimplementation.ops.deformable_aggregation_function` on arguments that were checked."""
    if _shapes_are_unreadable():
        return gather.deformable_aggregation(feature_maps, spatial_shape, scale_start_index, sampling_location, weights)
    bs, _, channels = feature_maps.shape
    num_queries, _, num_cams = sampling_location.shape[1:4]
    num_groups = weights.shape[-1]

    visible = ((sampling_location > 0) & (sampling_location < 1)).all(-1)
    location = sampling_location.where(visible[..., None], OUTSIDE)
    weights = weights.to(location.dtype).where(visible[..., None, None], 0)
    # As images see them: (bs, num_cams, num_queries, num_pts, ...), groups before queries in the weights.
    location = location.permute(0, 3, 1, 2, 4)
    weights = weights.permute(0, 3, 4, 5, 1, 2)

    output = location.new_zeros(bs, num_groups, channels // num_groups, num_queries)
    shapes, starts = read_integers(spatial_shape), read_integers(scale_start_index)
    rows = _rows_by_level(feature_maps, shapes, starts)
    if not rows:
        output = output + nothing(feature_maps, location, weights)
    for level, level_weights in enumerate(weights.unbind(2)):
        cameras_by_shape: dict[tuple, list[int]] = {}
        for cam in range(num_cams):
            if (cam, level) in rows:
                shape = tuple(shapes[cam][level])
                cameras_by_shape.setdefault(shape if _is_known(*shape) else (cam,), []).append(cam)
        for cams in cameras_by_shape.values():
            height, width = shapes[cams[0]][level]
            # Cast before they are stacked: autocast knows no common dtype for some halves.
            images = torch.stack([rows[cam, level].to(location.dtype) for cam in cams], dim=1).flatten(0, 1)
            sampled = _sample(images, height, width, _cameras(location, cams).flatten(0, 1))
            sampled = sampled.unflatten(0, (bs, len(cams))).unflatten(2, (num_groups, channels // num_groups))
            output = output + (sampled * _cameras(level_weights, cams)[:, :, :, None]).sum(dim=(1, -1))
    return output.permute(0, 3, 1, 2).flatten(2).to(feature_maps.dtype)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`reimplementation.ops.ms_deform_attn` on arguments that were checked."""
    if _shapes_are_unreadable():
        return gather.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    batch, num_values, num_heads, channels = value.shape
    num_queries = sampling_locations.shape[1]

    # Each head has an image of its own: (N * M, ...) with queries after heads.
    locations = sampling_locations.transpose(1, 2).flatten(0, 1)
    weights = attention_weights.to(locations.dtype).transpose(1, 2).flatten(0, 1)

    sizes = spatial_shapes.flip(-1).to(locations.device, locations.dtype)
    output = locations.new_zeros(batch * num_heads, channels, num_queries)
    levels = [
        (level, height, width, start)
        for level, ((height, width), start) in enumerate(zip(spatial_shapes.tolist(), level_start_index.tolist()))
        if _fits(height, width, start, num_values)
    ]
    if not levels:
        output = output + nothing(value, locations, weights)
    for level, height, width, start in levels:
        location, weight, size = locations[:, :, level], weights[:, :, level], sizes[level]
        pixel = location.detach() * size - 0.5
        touches = ((pixel > -1) & (pixel < size)).all(-1)
        rows = value.narrow(1, start, height * width).transpose(1, 2).flatten(0, 1)
        sampled = _sample(rows, height, width, location.where(touches[..., None], OUTSIDE))
        output = output + (sampled * weight.where(touches, 0)[:, None]).sum(-1)
    output = output.unflatten(0, (batch, num_heads)).permute(0, 3, 1, 2)
    return output.flatten(2).to(value.dtype)


def _sample(rows: Tensor, height: int, width: int, location: Tensor) -> Tensor:
    """Images as rows (B, height * width, C), locations (B, queries, points, 2): samples (B, C, queries, points)."""
    images = rows.to(location.dtype).transpose(1, 2).unflatten(2, (height, width))
    return F.grid_sample(images, 2 * location - 1, padding_mode="zeros", align_corners=False)


def _cameras(operand: Tensor, cams: list[int]) -> Tensor:
    """Those cameras of an operand (bs, num_cams, ...)."""
    if len(cams) == operand.shape[1]:
        return operand
    return operand.index_select(1, torch.tensor(cams, device=operand.device))


def _rows_by_level(feature_maps: Tensor, shapes: list, starts: list) -> dict[tuple[int, int], Tensor]:
    """{(camera, level): its rows (bs, H * W, C)}, without the levels that cannot be sampled.

    Levels that do not overlap come from one split, whose backward joins their gradients in one go; slices would
    each make a gradient as large as all features. An export to ONNX has no backward and gets slices: onnxruntime must
    know a Split's sizes while it loads a file, and more than 32 of them are stored outside of the file.
    """
    spans = {
        (cam, level): (starts[cam][level], height * width)
        for cam, levels in enumerate(shapes)
        for level, (height, width) in enumerate(levels)
        if _fits(height, width, starts[cam][level], feature_maps.shape[1])
    }
    if torch.onnx.is_in_onnx_export() or not all(_is_known(*span) for span in spans.values()):
        return {key: feature_maps.narrow(1, *span) for key, span in spans.items()}
    sizes, place, end = [], {}, 0
    for key, (start, count) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:  # they overlap
            return {key: feature_maps.narrow(1, *span) for key, span in spans.items()}
        sizes.append(start - end)
        place[key] = len(sizes)
        sizes.append(count)
        end = start + count
    pieces = feature_maps.split([*sizes, feature_maps.shape[1] - end], dim=1)
    return {key: pieces[i] for key, i in place.items()}


def _shapes_are_unreadable() -> bool:
    return torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()


def _is_known(*numbers: int | torch.SymInt) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _fits(height: int, width: int, start: int, num_rows: int) -> bool:
    """Whether a level has pixels, all of them within the rows that there are; of an unknown level, that it must."""
    conditions = (height > 0, width > 0, *lies_within(height, width, start, num_rows))
    if _is_known(height, width, start):
        return all(conditions)
    for condition in conditions:
        torch._check(condition)
    return True
