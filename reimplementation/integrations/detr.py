"""The module of Deformable DETR as its own repository has it, and as others took it over; recognised by its form.

DINO, Mask2Former and DINOv3's segmentation head have it unchanged; RF-DETR and Ultralytics' RT-DETR have arguments of
their own. None of these packages is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .attention import attend_by_level
from .probe import Probe
from .replacement import Accelerated


class DeformableDetr(Accelerated):
    """Deformable DETR, DINO, Mask2Former, DINOv3's segmentation head; with other channels of the value as well."""

    names = ("MSDeformAttn",)
    attributes = (
        "sampling_offsets",
        "attention_weights",
        "value_proj",
        "output_proj",
        "n_heads",
        "n_levels",
        "n_points",
    )

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels = module.n_levels
        shapes, starts = probe.shapes_in_tensors(levels)
        for coordinates, mask in ((2, probe.half(levels)), (4, None)):
            yield {
                "query": probe.queries(module.sampling_offsets.in_features),
                "reference_points": probe.references(levels, coordinates),
                "input_flatten": probe.rows(levels, module.value_proj.in_features),
                "input_spatial_shapes": shapes,
                "input_level_start_index": starts,
                "input_padding_mask": mask,
            }

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        output, _ = attend_by_level(
            self,
            (self.n_heads, self.n_levels, self.n_points),
            query,
            input_flatten,
            input_padding_mask,
            reference_points,
            input_spatial_shapes,
            input_level_start_index,
        )
        return output


class RFDetr(DeformableDetr):
    """RF-DETR of the package rfdetr, which hands in the shapes as numbers too."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
        input_spatial_shapes_hw: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        shapes: Any = input_spatial_shapes
        starts: Any = input_level_start_index
        if input_spatial_shapes_hw is not None:
            shapes, starts = input_spatial_shapes_hw, None
        return super().forward(query, reference_points, input_flatten, shapes, starts, input_padding_mask)


class Ultralytics(DeformableDetr):
    """RT-DETR of the package ultralytics: boxes that all levels share, and shapes as numbers."""

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels = module.n_levels
        for coordinates, mask in ((2, probe.half(levels)), (4, None)):
            yield {
                "query": probe.queries(module.d_model),
                "refer_bbox": probe.references(1, coordinates),
                "value": probe.rows(levels, module.d_model),
                "value_shapes": probe.shapes(levels),
                "value_mask": mask,
            }

    def forward(  # type: ignore[override]  # who calls it knows which of the two it is
        self,
        query: Tensor,
        refer_bbox: Tensor,
        value: Tensor,
        value_shapes: list,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        output, _ = attend_by_level(
            self,
            (self.n_heads, self.n_levels, self.n_points),
            query,
            value,
            value_mask,
            refer_bbox,
            value_shapes,
        )
        return output
