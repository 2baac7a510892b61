"""Checks of arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import name_of


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], advice: str = "") -> None:
    """Raise TypeError unless ``tensor`` is a strided tensor of one of the allowed dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor; got {tensor.layout}")
    if tensor.dtype not in allowed:
        names = " or ".join([name_of(dtype) for dtype in allowed])
        raise TypeError(f"{name} must be {names}; got {name_of(tensor.dtype)}{advice}")


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
    if tensor.device == device or (or_cpu and tensor.device.type == "cpu"):
        return
    where = f"{device} or cpu" if or_cpu and device.type != "cpu" else str(device)
    raise ValueError(f"{name} must be on {where}; got {tensor.device}")
