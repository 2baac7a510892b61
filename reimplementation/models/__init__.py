"""Modules built on the ops."""

from .deformable import (
    DeformableFeatureAggregation,
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)
from .ms_deform_attn import MSDeformAttn
from .sparsedrive import SparseDrive, sparse4d_v3, sparsedrive_small

__all__ = [
    "DeformableFeatureAggregation",
    "MSDeformAttn",
    "Sparse4DBox3DKeyPointsGenerator",
    "SparseBox3DKeyPointsGenerator",
    "SparseDrive",
    "SparsePoint3DKeyPointsGenerator",
    "sparse4d_v3",
    "sparsedrive_small",
]
