"""Modules built on the ops."""

from .deformable import (
    DeformableFeatureAggregation,
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)
from .ms_deform_attn import MSDeformAttn

__all__ = [
    "DeformableFeatureAggregation",
    "MSDeformAttn",
    "Sparse4DBox3DKeyPointsGenerator",
    "SparseBox3DKeyPointsGenerator",
    "SparsePoint3DKeyPointsGenerator",
]
