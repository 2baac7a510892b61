"""The levels of a feature pyramid within their rows: one rule for everybody who reads shapes and starts in Python."""

from __future__ import annotations

import torch
from torch import Tensor


def level_start_index(spatial_shapes: Tensor) -> Tensor:
    """The first row of every level where the levels follow one another.

    Args:
        spatial_shapes: (L, 2) integer (H, W) of each level, on any device; nothing waits for it.

    Returns:
        (L,) int64 on that device.
    """
    rows = spatial_shapes.long().prod(-1)
    return rows.cumsum(0) - rows


def lies_within(height, width, start, num_rows: int) -> tuple:
    """The conditions under which a level of height x width pixels lies within the rows; all must hold.

    The numbers may be integers, or the symbols of a tracer, or tensors of one shape; so are the conditions.
    """
    return height >= 0, width >= 0, start >= 0, start + height * width <= num_rows


def check_levels_fit(spatial_shape: Tensor, start_index: Tensor, num_rows: int, names: tuple[str, str, str]) -> None:
    """Raise ValueError where a level does not lie within its feature rows; only metadata on the CPU is looked at.

    Args:
        spatial_shape: (..., 2) integer (H, W) of each level.
        start_index: (...) integer first row of each level.
        num_rows: rows that there are.
        names: how the two tensors and the rows are called.
    """
    if torch.compiler.is_compiling() or spatial_shape.device.type != "cpu" or start_index.device.type != "cpu":
        return
    shapes = spatial_shape.reshape(-1, 2).tolist()
    for (height, width), start in zip(shapes, start_index.reshape(-1).tolist()):
        if not all(lies_within(height, width, start, num_rows)):
            shape_name, start_name, rows_name = names
            raise ValueError(
                f"{shape_name} and {start_name} must stay within {rows_name}={num_rows} rows; "
                f"got a level of {height} x {width} that starts at row {start}"
            )
