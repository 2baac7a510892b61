"""What the attention modules of other people's models have in common: from queries and features to the output.

Here alone an integration calls the op. A module hands in its linear layers and its sizes; the locations and the softmax
are computed beside the op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.ops.dtypes import at_least_float32
from reimplementation.ops.pyramid import levels_of_numbers

Shapes = Tensor | Sequence[Sequence[int]]


def attend_by_level(
    module: nn.Module,
    sizes: tuple[int, int, int],
    query: Tensor,
    features: Tensor,
    padding: Tensor | None,
    reference_points: Tensor,
    shapes: Shapes,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        The output (N, Lq, C), and the weights (N, Lq, heads, levels, points).
    """
    heads, levels, points = sizes
    value = module.value_proj(features)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0)
    check_rows(shapes, value.shape[1])
    shapes, starts = _as_tensors(shapes, starts, value.device)
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
    weights = module.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
    weights = weights.unflatten(-1, (levels, points))
    output = ops.ms_deform_attn(
        value.unflatten(-1, (heads, -1)),
        shapes,
        starts,
        _locations_by_level(reference_points, offsets, shapes),
        weights,
    )
    return module.output_proj(output), weights


def attend_in_boxes(
    module: nn.Module,
    num_heads: int,
    num_points: Sequence[int],
    query: Tensor,
    value: Tensor | Sequence[Tensor],
    reference_points: Tensor,
    shapes: Shapes,
    scale: Tensor,
    method: str = "default",
) -> tuple[Tensor, Tensor]:
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
        The output (N, Lq, C), and the weights (N, Lq, heads, sum(num_points)).
    """
    if reference_points.shape[-1] != 4:
        raise ValueError(f"reference_points must be boxes (N, Lq, 1, 4); got {tuple(reference_points.shape)}")
    if isinstance(value, Tensor):
        check_rows(shapes, value.shape[1])
    offsets = module.sampling_offsets(query).unflatten(-1, (num_heads, sum(num_points), 2))
    weights = module.attention_weights(query).unflatten(-1, (num_heads, sum(num_points))).softmax(-1)
    boxes = at_least_float32(reference_points)[:, :, None]
    locations = boxes[..., :2] + at_least_float32(offsets) * (boxes[..., 2:] * scale[:, None])
    output = ops.ms_deform_attn(value, shapes, None, locations, weights, num_points=num_points, method=method)
    return output, weights


def check_rows(shapes: Shapes, num_rows: int) -> None:
    """Raise ValueError unless the levels hold so many rows; shapes on a GPU are not read, that would wait for it."""
    if torch.compiler.is_compiling() or (isinstance(shapes, Tensor) and shapes.device.type != "cpu"):
        return
    pairs = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    total = sum(height * width for height, width in pairs)
    if total != num_rows:
        raise ValueError(f"the levels {list(pairs)} hold {total} pixels, but there are {num_rows} rows of features")


def _as_tensors(shapes: Shapes, starts: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(shapes, Tensor):
        return shapes, ops.level_start_index(shapes) if starts is None else starts
    pairs = tuple([(height, width) for height, width in shapes])
    return levels_of_numbers(pairs, (1,) * len(pairs), device)


def _locations_by_level(reference_points: Tensor, offsets: Tensor, shapes: Tensor) -> Tensor:
    """(N, Lq, heads, levels, points, 2), from offsets of that shape: pixels around points, or parts of boxes."""
    reference, offsets = at_least_float32(reference_points)[:, :, None, :, None], at_least_float32(offsets)
    if reference.shape[-1] == 2:
        size = shapes.flip(-1).to(offsets.device, offsets.dtype, non_blocking=True)
        return reference + offsets / size[:, None]
    if reference.shape[-1] == 4:
        return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / offsets.shape[-2]))
    raise ValueError(f"reference_points must be (N, Lq, L, 2 or 4); got {tuple(reference_points.shape)}")
