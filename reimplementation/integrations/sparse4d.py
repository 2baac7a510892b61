"""The module ``DeformableFeatureAggregation`` of SparseDrive and Sparse4D; recognised by its form."""

from __future__ import annotations

from reimplementation.models.deformable import DeformableFeatureAggregation

from .replacement import Accelerated


class SparseAggregation(Accelerated, DeformableFeatureAggregation):
    """SparseDrive and Sparse4D: the forward is that of our module, which reads what theirs holds."""

    names = ("DeformableFeatureAggregation",)
    attributes = (
        "embed_dims",
        "num_groups",
        "num_levels",
        "num_cams",
        "num_pts",
        "attn_drop",
        "proj_drop",
        "residual_mode",
        "kps_generator",
        "camera_encoder",
        "weights_fc",
        "output_proj",
    )
    incomparable = "its plain path samples beyond the borders of images too, and its compiled op has no CPU kernel"
    use_deformable_func = property(lambda self: True)
