"""Deformable feature aggregation: 3D queries gather image features at their key points, in every camera.

The modules take the place of SparseDrive's modules of the same names: same arguments, same state-dict names.
In a project that builds its modules through a registry, register these classes under their own names.
"""

from reimplementation.ops import project_points

from .aggregation import DeformableFeatureAggregation
from .key_points import (
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)

__all__ = [
    "DeformableFeatureAggregation",
    "Sparse4DBox3DKeyPointsGenerator",
    "SparseBox3DKeyPointsGenerator",
    "SparsePoint3DKeyPointsGenerator",
    "project_points",
]
