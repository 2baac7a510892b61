"""Affine maps of points, in full precision.

Positions span a hundred metres and pixels a thousand columns: TF32 and half precision keep three digits of
that, so these products are written as elementwise multiply-adds, which neither TF32 nor autocast touches.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
