"""Both ops in tensor arithmetic, for a tracer: it cannot read the levels' shapes, which grid_sample wants as numbers.

Every pixel of a footprint becomes a row number and a weight, and one gather per level reads the rows. A compiler fuses
gather, product and sum; run as it stands, this takes more memory than grid_sample.
"""

from __future__ import annotations

from functools import reduce
from operator import and_

import torch
from torch import Tensor

from ..levels import lies_within


def deformable_aggregation(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """`reimplementation.ops.deformable_aggregation_function` on arguments that were checked."""
    visible = ((sampling_location > 0) & (sampling_location < 1)).all(-1)
    location = sampling_location.where(visible[..., None], 0.5)
    weights = weights.to(location.dtype).where(visible[..., None, None], 0)
    shapes, starts = _as_numbers_beside(feature_maps, spatial_shape, scale_start_index)

    bs, num_queries = location.shape[:2]
    output = location.new_zeros(bs, num_queries, feature_maps.shape[2])
    if shapes.numel() == 0 or feature_maps.shape[1] == 0:
        return (output + nothing(feature_maps, location, weights)).to(feature_maps.dtype)
    for level, level_weights in enumerate(weights.unbind(4)):
        output = output + _sum_of_samples(feature_maps, shapes[:, level], starts[:, level], location, level_weights)
    return output.to(feature_maps.dtype)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`reimplementation.ops.ms_deform_attn` on arguments that were checked."""
    batch, num_values, num_heads, channels = value.shape
    shapes, starts = _as_numbers_beside(value, spatial_shapes, level_start_index)
    size = shapes.flip(-1).to(sampling_locations.dtype)[:, None]
    pixel = sampling_locations.detach() * size - 0.5
    touches = ((pixel > -1) & (pixel < size)).all(-1)

    # Each head has rows of its own: (N * M, ...) with queries after heads.
    locations = sampling_locations.where(touches[..., None], 0.5).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.to(locations.dtype).where(touches, 0).transpose(1, 2).flatten(0, 1)
    rows = value.transpose(1, 2).flatten(0, 1)

    output = locations.new_zeros(*locations.shape[:2], channels)
    if shapes.numel() == 0 or num_values == 0:
        output = output + nothing(rows, locations, weights)
    else:
        levels = zip(shapes, starts, locations.unbind(2), weights[..., None].unbind(2))
        for shape, start, location, weight in levels:
            output = output + _sum_of_samples(rows, shape, start, location, weight)
    return output.unflatten(0, (batch, num_heads)).transpose(1, 2).flatten(2).to(value.dtype)


def nothing(*operands: Tensor) -> Tensor:
    """A sum of nothing: without any level to sample, the output still has gradients, and they are zero."""
    return reduce(torch.add, [operand[:0].sum() for operand in operands])


def _sum_of_samples(rows: Tensor, shape: Tensor, start: Tensor, location: Tensor, weights: Tensor) -> Tensor:
    """Sample the images of one level and sum over everything between queries and groups.

    Args:
        rows: (B, num_rows, C), num_rows >= 1.
        shape: (*cameras, 2) int64 (H, W) of the level.
        start: (*cameras) int64, its first row.
        location: (B, queries, points, *cameras, 2), finite.
        weights: (B, queries, points, *cameras, G) in the locations' dtype.

    Returns:
        (B, queries, C). A level that does not fit the rows adds nothing.
    """
    height, width = shape.unbind(-1)
    fits = reduce(and_, (height > 0, width > 0, *lies_within(height, width, start, rows.shape[1])))
    pixel = location * shape.flip(-1).to(location.dtype) - 0.5
    corner = pixel.detach().floor()
    (left, top), (right_weight, lower_weight) = corner.unbind(-1), (pixel - corner).unbind(-1)

    indices, insides, bilinear = [], [], []
    for y, y_weight in ((top, 1 - lower_weight), (top + 1, lower_weight)):
        for x, x_weight in ((left, 1 - right_weight), (left + 1, right_weight)):
            inside = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            indices.append(torch.where(inside, start + y.long() * width + x.long(), 0))
            insides.append(inside)
            bilinear.append(y_weight * x_weight)
    index, inside = torch.stack(indices, -1).flatten(2), torch.stack(insides, -1).flatten(2)
    weights = (weights[..., None, :] * torch.stack(bilinear, -1)[..., None]).flatten(2, -2)

    channels, num_groups = rows.shape[2], weights.shape[3]
    samples = rows.gather(1, index.flatten(1)[..., None].expand(-1, -1, channels)).to(location.dtype)
    samples = samples.unflatten(1, index.shape[1:]).where(inside[..., None], 0)
    return (samples.unflatten(3, (num_groups, -1)) * weights[..., None]).sum(2).flatten(2)


def _as_numbers_beside(features: Tensor, shapes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes and first rows where the features are, in int64: the numbers of rows need not fit narrower integers."""

    def beside(numbers: Tensor) -> Tensor:
        return numbers.to(features.device, torch.int64, non_blocking=True)

    return beside(shapes), beside(starts)
