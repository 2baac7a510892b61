"""The ops and what surrounds them; see each function's docstring for shapes and types."""

from .backends import CUDA_EXT_AVAILABLE, available_backends, build_info, use_backend
from .box_key_points import box_key_points
from .deformable_aggregation import deformable_aggregation_function
from .deformable_feature_aggregation import deformable_feature_aggregation
from .feature_maps import feature_maps_format
from .levels import level_start_index
from .linear_relu_norm import linear_relu_norm
from .ms_deform_attn import MSDeformAttnFunction, ms_deform_attn
from .ms_deform_attn_from_offsets import ms_deform_attn_from_offsets
from .project_points import project_points

__all__ = [
    "CUDA_EXT_AVAILABLE",
    "MSDeformAttnFunction",
    "available_backends",
    "box_key_points",
    "build_info",
    "deformable_aggregation_function",
    "deformable_feature_aggregation",
    "feature_maps_format",
    "level_start_index",
    "linear_relu_norm",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
    "project_points",
    "use_backend",
]
