"""The dtypes that the ops know, and casts that look first."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as a small kernel's launch to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened to float32; anything wider as it is."""
    return as_dtype(tensor, torch.promote_types(tensor.dtype, torch.float32))


def name_of(dtype: torch.dtype) -> str:
    """The name without ``torch.``, as errors have it."""
    return str(dtype).removeprefix("torch.")
