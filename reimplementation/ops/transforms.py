"""Affine maps of points, in full precision.

Positions span a hundred metres and pixels a thousand columns: TF32 and half precision keep three digits of
that, so these products are written as elementwise multiply-adds, which neither TF32 nor autocast touches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import as_dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened to float32; anything wider as it is."""
    return as_dtype(tensor, torch.promote_types(tensor.dtype, torch.float32))


def transform(points: Tensor, matrix: Tensor) -> Tensor:
    """Affine map of points.

    Args:
        points: (..., d), broadcast against the leading dimensions of ``matrix``.
        matrix: (..., k, d + 1): a linear map and, as last column, a translation. Same dtype as ``points``.

    Returns:
        (..., k): ``matrix[..., :d] @ point + matrix[..., d]``.
    """
    *columns, result = matrix.unbind(-1)
    for column, component in zip(columns, points.split(1, dim=-1), strict=True):
        result = torch.addcmul(result, column, component)
    return result
