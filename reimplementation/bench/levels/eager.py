"""Level 1: eager PyTorch. A line is an operator, which reads its operands from memory and writes its result there.

`grid_sample` wants images, channels first, so the rows of each level are transposed into one; and it returns all
samples before anybody weighs them. The loop over levels and the sum run in Python.

All cameras have the same levels here, as on a car, and levels follow one another. TorchScript and torch.compile take
these two functions as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reimplementation.bench.inputs import AggregationInputs, OpInputs


def why_not(device: torch.device) -> str | None:
    return None


def deformable_aggregation(features: Tensor, shapes: list[list[int]], location: Tensor, weights: Tensor) -> Tensor:
    """`reimplementation.ops.deformable_aggregation_function` of cameras whose levels have these (H, W)."""
    batch_size, num_queries, num_points, num_cams = location.shape[:4]
    num_groups, channels = weights.shape[5], features.shape[2]
    hidden = ((location <= 0) | (location >= 1)).any(dim=-1, keepdim=True)
    grid = (2 * location - 1).masked_fill(hidden, -4.0)  # an image spans -1 to 1
    grid = grid.permute(0, 3, 1, 2, 4).flatten(0, 1)
    rows = features.view(batch_size * num_cams, features.shape[1] // num_cams, channels).transpose(1, 2)
    output = features.new_zeros(batch_size, num_groups, channels // num_groups, num_queries)
    start = 0
    for level, shape in enumerate(shapes):
        height, width = shape[0], shape[1]
        image = rows[:, :, start : start + height * width].reshape(batch_size * num_cams, channels, height, width)
        samples = F.grid_sample(image, grid, align_corners=False)  # (batch * cameras, channels, queries, points)
        samples = samples.view(batch_size, num_cams, num_groups, channels // num_groups, num_queries, num_points)
        weight = weights[:, :, :, :, level].permute(0, 3, 4, 1, 2).unsqueeze(3)
        output = output + (samples * weight).sum(dim=(1, 5))
        start += height * width
    return output.permute(0, 3, 1, 2).flatten(2)


def ms_deform_attn(value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`reimplementation.ops.ms_deform_attn` of levels with these (H, W)."""
    batch_size, num_rows, num_heads, channels = value.shape
    num_queries = locations.shape[1]
    rows = value.permute(0, 2, 3, 1).reshape(batch_size * num_heads, channels, num_rows)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (batch * heads, queries, levels, points, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)
    output = value.new_zeros(batch_size * num_heads, channels, num_queries)
    start = 0
    for level, shape in enumerate(shapes):
        height, width = shape[0], shape[1]
        image = rows[:, :, start : start + height * width].reshape(batch_size * num_heads, channels, height, width)
        samples = F.grid_sample(image, grids[:, :, level], align_corners=False)
        output = output + (samples * weights[:, None, :, level]).sum(dim=-1)
        start += height * width
    return output.view(batch_size, num_heads * channels, num_queries).transpose(1, 2)


def prepare(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op on these levels, as a function of features, locations and weights."""
    return bind(function_of(inputs), inputs)


def function_of(inputs: OpInputs) -> Callable[..., Tensor]:
    return deformable_aggregation if isinstance(inputs, AggregationInputs) else ms_deform_attn


def bind(function: Callable[..., Tensor], inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One of the two functions, with the shapes of the levels of these inputs as numbers."""
    _, shapes, _, _, _ = inputs
    levels = (shapes[0] if isinstance(inputs, AggregationInputs) else shapes).tolist()
    return lambda features, locations, weights: function(features, levels, locations, weights)
