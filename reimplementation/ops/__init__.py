"""The ops and what surrounds them; see each function's docstring for shapes and types."""

from .backends import CUDA_EXT_AVAILABLE, available_backends, build_info, use_backend
from .deformable_aggregation import deformable_aggregation_function
from .feature_maps import feature_maps_format
from .ms_deform_attn import MSDeformAttnFunction, ms_deform_attn

__all__ = [
    "CUDA_EXT_AVAILABLE",
    "MSDeformAttnFunction",
    "available_backends",
    "build_info",
    "deformable_aggregation_function",
    "feature_maps_format",
    "ms_deform_attn",
    "use_backend",
]
