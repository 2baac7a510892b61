"""The module ``DeformableFeatureAggregation`` of SparseDrive and Sparse4D; recognised by its form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from reimplementation.models.deformable import DeformableFeatureAggregation

from .probe import Probe
from .replacement import Accelerated


class SparseAggregation(Accelerated, DeformableFeatureAggregation):
    """SparseDrive and Sparse4D: the forward is that of our module, which reads what theirs holds.

    It is not compared with the original, whose plain path samples beyond the images' borders too, and whose compiled
    op is not there on a CPU.
    """

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
    use_deformable_func = property(lambda self: True)

    @classmethod
    def probes(cls, module: nn.Module, probe: Probe) -> Iterator[dict[str, Any]]:
        return iter(())
