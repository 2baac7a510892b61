"""Both ops in tensor arithmetic, for a tracer: it cannot read the levels' shapes, which grid_sample wants as numbers.

Every pixel of a footprint becomes a row number and a weight, and one gather per level reads the rows. A compiler fuses
gather, product and sum; run as it stands, this takes more memory than grid_sample.

Dimensions keep the operands' order up to the sum, attention's heads too. Inductor, of PyTorch 2.11 and 2.13, stores a
result in the order in which it reads the operands, padded on a GPU; a view that it made of the result before it decided
so reads other numbers, and beyond the memory.
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
    num_rows, channels = feature_maps.shape[1:]
    output = location.new_zeros(bs, num_queries, channels)
    if shapes.numel() == 0 or num_rows == 0:
        return (output + nothing(feature_maps, location, weights)).to(feature_maps.dtype)
    for level, weight in enumerate(weights.unbind(4)):
        row, inside, bilinear = _corners(location, shapes[:, level], starts[:, level], num_rows)
        weight = (weight[..., None, :] * bilinear[..., None]).flatten(2, -2)
        output = output + _weighted_sum(feature_maps, row.flatten(2), inside.flatten(2), weight)
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
    num_queries = sampling_locations.shape[1]
    shapes, starts = _as_numbers_beside(value, spatial_shapes, level_start_index)
    size = shapes.flip(-1).to(sampling_locations.dtype)[:, None]
    position = sampling_locations.detach() * size - 0.5
    touches = ((position > -1) & (position < size)).all(-1)
    locations = sampling_locations.where(touches[..., None], 0.5)
    weights = attention_weights.to(locations.dtype).where(touches, 0)

    rows = value.flatten(1, 2)  # each head's own, one after the other in every pixel
    head = torch.arange(num_heads, device=value.device)[:, None, None]
    output = locations.new_zeros(batch, num_queries * num_heads, channels)
    if shapes.numel() == 0 or num_values == 0:
        output = output + nothing(rows, locations, weights)
    else:
        for shape, start, location, weight in zip(shapes, starts, locations.unbind(3), weights.unbind(3)):
            pixel, inside, bilinear = _corners(location, shape, start, num_values)
            row, inside, weight = (
                each.flatten(1, 2).flatten(2)
                for each in (pixel * num_heads + head, inside, weight[..., None] * bilinear)
            )
            output = output + _weighted_sum(rows, row, inside, weight[..., None])
    return output.view(batch, num_queries, num_heads * channels).to(value.dtype)


def nothing(*operands: Tensor) -> Tensor:
    """A sum of nothing: without any level to sample, the output still has gradients, and they are zero."""
    return reduce(torch.add, [operand[:0].sum() for operand in operands])


def _corners(location: Tensor, shape: Tensor, start: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The four pixels around each location in an image of one level: their rows, whether they exist, and their weights.

    They are stacked, for a stack is something that a compiler stores: it would else compute them for each channel.

    Args:
        location: (..., *cameras, 2), finite.
        shape: (*cameras, 2) int64 (H, W) of the level.
        start: (*cameras) int64, its first row. A level that does not fit num_rows rows has no pixels.

    Returns:
        Three tensors (..., *cameras, 4). The row of a pixel that does not exist is 0.
    """
    height, width = shape.unbind(-1)
    fits = reduce(and_, (height > 0, width > 0, *lies_within(height, width, start, num_rows)))
    pixel = location * shape.flip(-1).to(location.dtype) - 0.5
    first = pixel.detach().floor()
    (left, top), (right, down) = first.unbind(-1), (pixel - first).unbind(-1)

    rows, insides, bilinear = [], [], []
    for y, along_y in ((top, 1 - down), (top + 1, down)):
        for x, along_x in ((left, 1 - right), (left + 1, right)):
            inside = fits & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            rows.append(torch.where(inside, start + y.long() * width + x.long(), 0))
            insides.append(inside)
            bilinear.append(along_y * along_x)
    return torch.stack(rows, -1), torch.stack(insides, -1), torch.stack(bilinear, -1)


def _weighted_sum(rows: Tensor, row: Tensor, inside: Tensor, weight: Tensor) -> Tensor:
    """Read rows, and sum them.

    Args:
        rows: (B, num_rows, C).
        row: (B, queries, samples) int64, which of them each sample is; it counts if it is inside (bool).
        weight: (B, queries, samples, G), of each group of channels.

    Returns:
        (B, queries, C) in the weights' dtype.
    """
    samples = rows.gather(1, row.flatten(1)[..., None].expand(-1, -1, rows.shape[2])).to(weight.dtype)
    samples = samples.unflatten(1, row.shape[1:]).where(inside[..., None], 0)
    return (samples.unflatten(3, (weight.shape[3], -1)) * weight[..., None]).sum(2).flatten(2)


def _as_numbers_beside(features: Tensor, shapes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes and first rows where the features are, in int64: the numbers of rows need not fit narrower integers."""

    def beside(numbers: Tensor) -> Tensor:
        return numbers.to(features.device, torch.int64, non_blocking=True)

    return beside(shapes), beside(starts)
