"""The forms in which callers have the operands of multi-scale deformable attention, brought into the operator's one.

Other people's models hold shapes as lists, leave out the first rows, give levels different numbers of points, or take
one pixel instead of four. None of this needs a kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from .checks import check_dtype, check_shape
from .dtypes import FLOATING, INTEGER, at_least_float32
from .pyramid import Pairs, levels_of_numbers, levels_of_tensors

__all__ = ["METHODS", "in_plain_form"]

METHODS = ("default", "discrete", "discrete_by_height")


def in_plain_form(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, first rows, locations and weights of `ms_deform_attn` as the operator takes them.

    Where levels have different numbers of points, each is listed so often that all have the same number.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    listed = _checked_levels(spatial_shapes, level_start_index)
    repeats = (1,) * len(listed)
    if num_points is not None:
        counts = _counts(num_points, len(listed))
        together = math.gcd(*counts) or 1
        repeats = tuple([count // together for count in counts])
        sampling_locations, attention_weights = _by_level(
            sampling_locations, attention_weights, sum(counts) // together, together
        )
    shapes, starts = _levels(listed, level_start_index, repeats, value)
    if method != "default":
        sampling_locations = _centres_of_pixels(sampling_locations, shapes, by_height=method == "discrete_by_height")
    return shapes, starts, sampling_locations, attention_weights


def _counts(num_points: Any, num_levels: int) -> list[int]:
    counts = [index(count) for count in num_points]
    if len(counts) != num_levels or any([count < 0 for count in counts]):
        raise ValueError(f"num_points must be L={num_levels} numbers from 0 on, one for each level; got {num_points}")
    return counts


def _by_level(locations: Tensor, weights: Tensor, num_levels: int, num_points: int) -> tuple[Tensor, Tensor]:
    """(..., sum(num_points), 2) and (..., sum(num_points)) as (..., L, P, 2) and (..., L, P)."""
    check_dtype("sampling_locations", locations, FLOATING)
    check_dtype("attention_weights", weights, FLOATING)
    total = num_levels * num_points
    for name, tensor, dim in (("sampling_locations", locations, 5), ("attention_weights", weights, 4)):
        if tensor.dim() != dim or tensor.shape[3] != total:
            dims = "(N, Lq, M, sum(num_points), 2)" if dim == 5 else "(N, Lq, M, sum(num_points))"
            raise ValueError(f"{name} must be {dims} with sum(num_points)={total}; got {tuple(tensor.shape)}")
    return locations.unflatten(3, (num_levels, num_points)), weights.unflatten(3, (num_levels, num_points))


def _checked_levels(shapes: Any, starts: Any) -> Tensor | Pairs:
    """The shapes, as a tensor (L, 2) or as pairs."""
    if starts is not None:
        check_dtype("level_start_index", starts, INTEGER)
    if isinstance(shapes, (list, tuple)):
        return _pairs(shapes)
    check_dtype("spatial_shapes", shapes, INTEGER)
    check_shape("spatial_shapes", shapes, ("L", 2), {})
    return shapes


def _levels(
    shapes: Tensor | Pairs, starts: Tensor | None, repeats: tuple[int, ...], value: Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(shapes, Tensor):
        return levels_of_tensors(shapes, starts, repeats)
    if starts is not None:
        as_tensor, _ = levels_of_numbers(shapes, (1,) * len(shapes), value.device)
        return levels_of_tensors(as_tensor, starts, repeats)
    if not torch.compiler.is_compiling():
        total = sum(height * width for height, width in shapes)
        if value.dim() == 4 and total > value.shape[1]:
            raise ValueError(
                f"spatial_shapes {list(shapes)} hold {total} pixels, but value has S={value.shape[1]} rows"
            )
    return levels_of_numbers(shapes, repeats, value.device)


def _pairs(shapes: Any) -> Pairs:
    """(height, width) of each level, as tuples of numbers that can be told apart."""
    try:
        pairs = tuple([(_whole(height), _whole(width)) for height, width in shapes])
    except (TypeError, ValueError):
        raise TypeError(
            f"spatial_shapes must be a tensor, or a list of pairs (height, width) of whole numbers; got {shapes!r}"
        ) from None
    if not torch.compiler.is_compiling() and any([number < 0 for pair in pairs for number in pair]):
        raise ValueError(f"spatial_shapes must not be negative; got {list(pairs)}")
    return pairs


def _whole(number: Any) -> Any:
    return number if isinstance(number, (int, torch.SymInt)) else index(number)


def _centres_of_pixels(locations: Tensor, shapes: Tensor, by_height: bool) -> Tensor:
    """(N, Lq, M, L, P, 2): the centre of the pixel that each location is in, or nearest to.

    A pixel is that of ``int(location * (W, H) + 0.5)``, rounded step by step as there. All steps share one tensor.
    """
    check_shape("sampling_locations", locations, ("N", "Lq", "M", "L", "P", 2), {"L": shapes.shape[0]})
    locations = at_least_float32(locations.detach())
    size = shapes.flip(-1).to(locations.device, locations.dtype, non_blocking=True)[:, None]
    last = (size[..., 1:] if by_height else size) - 1
    pixel = (locations * size).add_(0.5).clamp_(torch.zeros_like(last), last).trunc_()
    return pixel.add_(0.5).div_(size)
