"""What the attention modules of other people's models have in common: from queries and features to the output.

Here alone an integration calls the op. A module hands in its linear layers and its sizes; the locations and the softmax
are part of the op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.ops.dtypes import at_least_float32
from reimplementation.ops.pyramid import joined, levels_of_numbers, levels_of_tensors

Shapes = Tensor | Sequence[Sequence[int]]


def attend_by_level(
    module: Any,
    sizes: tuple[int, int, int],
    query: Tensor,
    features: Tensor,
    padding: Tensor | None,
    reference_points: Tensor,
    shapes: Shapes,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The attention of Deformable DETR (arXiv 2010.04159, section 4.1) by the linear layers of a module.

    Args:
        module: holds ``sampling_offsets``, ``attention_weights``, ``value_proj`` and ``output_proj``.
        sizes: numbers of heads, levels and points.
        query: (N, Lq, C).
        features: (N, S, C), the rows of all levels.
        padding: (N, S) bool, True where a row counts as zero; or None.
        reference_points: (N, Lq, L or 1, 2) points, or (N, Lq, L or 1, 4) boxes, normalised.
        shapes: (H, W) of each level, as a tensor (L, 2) or as pairs of numbers.
        starts: (L,) the first row of each level, or None where they follow one another.

    Returns:
        The output (N, Lq, C), and the weights (N, Lq, heads, levels, points) where the module has hooks, else None.
    """
    heads, levels, points = sizes
    value = module.value_proj(features)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0)
    check_rows(shapes, value.shape[1])
    shapes, starts = _as_tensors(shapes, starts, value.device)
    logits = module.attention_weights(query).unflatten(-1, (heads, levels, points))
    output = ops.ms_deform_attn_from_offsets(
        value.unflatten(-1, (heads, -1)),
        shapes,
        starts,
        at_least_float32(reference_points),
        module.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2)),
        logits,
    )
    return module.output_proj(output), _weights(module, logits)


def attend_in_boxes(
    module: Any,
    num_heads: int,
    num_points: Sequence[int],
    query: Tensor,
    value: Tensor | Sequence[Tensor],
    reference_points: Tensor,
    shapes: Shapes,
    scale: Tensor,
    method: str = "default",
) -> tuple[Tensor, Tensor | None]:
    """The attention of RT-DETRv2 (arXiv 2407.17140) and D-FINE (arXiv 2410.13842): each level has its number of points.

    Args:
        module: holds ``sampling_offsets`` and ``attention_weights``.
        num_heads: heads.
        num_points: points in each level.
        query: (N, Lq, C).
        value: (N, S, heads, C / heads), or (N, heads, C / heads, rows) of each level.
        reference_points: (N, Lq, 1, 4) boxes, normalised.
        shapes: (H, W) of each level, as a tensor (L, 2) or as pairs of numbers.
        scale: (sum(num_points),) what the offsets of each point are in sizes of the box.
        method: as `ops.ms_deform_attn` has it.

    Returns:
        The output (N, Lq, C), and the weights (N, Lq, heads, points of all levels together) likewise.
    """
    if reference_points.shape[-1] != 4:
        raise ValueError(f"reference_points must be boxes (N, Lq, 1, 4); got {tuple(reference_points.shape)}")
    offsets = module.sampling_offsets(query).unflatten(-1, (num_heads, sum(num_points), 2))
    logits = module.attention_weights(query).unflatten(-1, (num_heads, sum(num_points)))
    if method != "default":
        return _of_pixels(value, shapes, reference_points, offsets, logits, num_points, scale, method)
    value = value if isinstance(value, Tensor) else joined(value)
    check_rows(shapes, value.shape[1])
    together = math.gcd(*num_points)
    repeats = tuple([count // together for count in num_points])
    shapes, starts = _as_tensors(shapes, None, value.device, repeats)
    output = ops.ms_deform_attn_from_offsets(
        value,
        shapes,
        starts,
        at_least_float32(reference_points),
        offsets.unflatten(-2, (-1, together)),
        logits.unflatten(-1, (-1, together)),
        2 * at_least_float32(scale)[::together],  # the op counts in halves of a box
    )
    return output, _weights(module, logits)


def check_rows(shapes: Shapes, num_rows: int) -> None:
    """Raise ValueError unless the levels hold so many rows; shapes on a GPU are not read, that would wait for it."""
    if torch.compiler.is_compiling() or (isinstance(shapes, Tensor) and shapes.device.type != "cpu"):
        return
    pairs = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    total = sum(height * width for height, width in pairs)
    if total != num_rows:
        raise ValueError(f"the levels {list(pairs)} hold {total} pixels, but there are {num_rows} rows of features")


def _of_pixels(
    value: Tensor | Sequence[Tensor],
    shapes: Shapes,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    num_points: Sequence[int],
    scale: Tensor,
    method: str,
) -> tuple[Tensor, Tensor]:
    """One pixel for each location, which the fused op does not do."""
    boxes, weights = at_least_float32(reference_points)[:, :, None], logits.softmax(-1)
    locations = boxes[..., :2] + at_least_float32(offsets) * (boxes[..., 2:] * scale[:, None])
    output = ops.ms_deform_attn(value, shapes, None, locations, weights, num_points=num_points, method=method)
    return output, weights


def _weights(module: Any, logits: Tensor) -> Tensor | None:
    """The attention weights, which the op does not make, if anybody may look: models collect them by hooks."""
    return logits.flatten(3).softmax(-1).view(logits.shape) if module._forward_hooks else None


def _as_tensors(
    shapes: Shapes, starts: Tensor | None, device: torch.device, repeats: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Shapes and first rows of levels, each listed as often as ``repeats`` says; once where it says nothing."""
    repeats = repeats or (1,) * len(shapes)
    if isinstance(shapes, Tensor):
        return levels_of_tensors(shapes, starts, repeats)
    return levels_of_numbers(tuple([(height, width) for height, width in shapes]), repeats, device)
