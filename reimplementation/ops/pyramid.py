"""The levels of a pyramid as callers have them: shapes as Python numbers, and features level by level.

Numbers become tensors on a device once, and not at each call.

A copy from the host to a GPU at each call would cost more than a small op, and could not be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backends import constant_in_graphs
from .checks import check_dtype, check_shape
from .dtypes import FLOATING
from .levels import level_start_index

__all__ = ["joined", "levels_of_numbers", "levels_of_tensors"]

Pairs = tuple[tuple[int, int], ...]
"""(height, width) of each level; symbols of a tracer count as numbers."""


def joined(levels: Any) -> Tensor:
    """A tensor (N, M, D, rows) for each level, as one value (N, S, M, D)."""
    if not isinstance(levels, (list, tuple)):
        check_dtype("value", levels, FLOATING)
    if not levels:
        raise ValueError("value must be a tensor, or a list with one for each level; got an empty list")
    sizes: dict[str, int] = {}
    for i, level in enumerate(levels):
        check_dtype(f"value[{i}]", level, (levels[0].dtype,) if i else FLOATING)
        sizes.pop("rows", None)
        check_shape(f"value[{i}]", level, ("N", "M", "D", "rows"), sizes)
    # Flat rows of three dimensions: `cat` would keep the strides of four, which look like channels last.
    rows = torch.cat([level.flatten(1, 2).transpose(1, 2) for level in levels], 1)
    return rows.unflatten(2, (sizes["M"], sizes["D"]))


def levels_of_numbers(pairs: Pairs, repeats: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The shapes (L, 2) and first rows (L,) of levels that follow one another, int64, on a device.

    They are made once for the same numbers and device. A compiler takes them for constants of its graph, unless the
    numbers are symbols of its own.

    Args:
        pairs: (height, width) of each level.
        repeats: how many times each level is listed.
        device: where the tensors shall be.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if all([has_static_value(number) for pair in pairs for number in pair]):
            return _shapes_made_once(pairs, repeats, device), _starts_made_once(pairs, repeats, device)
        return _made_by_fills(pairs, repeats, device)
    if torch._C._len_torch_dispatch_stack() > 0:  # tensors of a mode, such as fake ones, are not for later calls
        return _made_by_fills(pairs, repeats, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _made_by_fills(pairs, repeats, device)  # their memory is the graph's
    return _made_once(pairs, repeats, device)


def levels_of_tensors(shapes: Tensor, starts: Tensor | None, repeats: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same of shapes (L, 2) and first rows (L,) that are tensors; without the latter, levels follow one another.

    Nothing waits for a GPU.
    """
    starts = level_start_index(shapes) if starts is None else starts
    if all([count == 1 for count in repeats]):
        return shapes, starts
    return _listed_often(shapes, repeats), _listed_often(starts, repeats)


def _listed_often(numbers: Tensor, repeats: Sequence[int]) -> Tensor:
    rows = [row for row, count in zip(numbers.unbind(0), repeats) for _ in range(count)]
    return torch.stack(rows) if rows else numbers[:0]


@lru_cache(maxsize=512)
def _made_once(pairs: Pairs, repeats: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Neither for inference alone, whatever the first call was for, nor of a mode that traces.
    with torch.inference_mode(False), torch.utils._python_dispatch._disable_current_modes():
        shapes = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        listed = levels_of_tensors(shapes, None, repeats)
        return listed[0].to(device), listed[1].to(device)


@constant_in_graphs
def _shapes_made_once(pairs: Pairs, repeats: tuple[int, ...], device: torch.device) -> Tensor:
    return _made_once(pairs, repeats, device)[0]


@constant_in_graphs
def _starts_made_once(pairs: Pairs, repeats: tuple[int, ...], device: torch.device) -> Tensor:
    return _made_once(pairs, repeats, device)[1]


def _made_by_fills(pairs: Pairs, repeats: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made on the device itself, number by number."""
    fills = [torch.full((), number, dtype=torch.int64, device=device) for pair in pairs for number in pair]
    shapes = torch.stack(fills).view(-1, 2) if fills else torch.zeros(0, 2, dtype=torch.int64, device=device)
    return levels_of_tensors(shapes, None, repeats)
