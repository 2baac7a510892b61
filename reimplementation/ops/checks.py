"""Argument checks that the ops share: each error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], advice: str = "") -> None:
    """Raise TypeError unless ``tensor`` is a strided tensor of one of the allowed dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor; got {tensor.layout}")
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {names}; got {str(tensor.dtype).removeprefix('torch.')}{advice}")


def check_shape(name: str, tensor: Tensor, dims: tuple[str | int, ...], sizes: dict[str, int]) -> None:
    """Match a shape against named dimensions; raise ValueError where it differs.

    A name seen for the first time takes its size from ``tensor`` and is written to ``sizes``; a name seen before
    must have that size again. An integer must match as it is.
    """
    shape = tensor.shape
    num_known = len(sizes)
    if len(shape) == len(dims):
        for dim, size in zip(dims, shape):
            if size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                break
        else:
            return
    for dim in list(sizes)[num_known:]:
        del sizes[dim]
    expected = f"({', '.join(map(str, dims))}{',' * (len(dims) == 1)})"
    known = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
    raise ValueError(f"{name} must be {expected}{' with ' if known else ''}{known}; got {tuple(shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device, or_cpu: bool = False) -> None:
    """Raise ValueError unless ``tensor`` is on ``device`` (or on the CPU, where that is allowed)."""
    if tensor.device != device and not (or_cpu and tensor.device.type == "cpu"):
        where = f"{device}{' or cpu' if or_cpu else ''}"
        raise ValueError(f"{name} must be on {where}; got {tensor.device}")


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
        if height < 0 or width < 0 or start < 0 or start + height * width > num_rows:
            shape_name, start_name, rows_name = names
            raise ValueError(
                f"{shape_name} and {start_name} must stay within {rows_name}={num_rows} rows; "
                f"got a level of {height} x {width} that starts at row {start}"
            )
