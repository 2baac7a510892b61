"""The modules of RT-DETR, RT-DETRv2, D-FINE and DEIM as their own repositories have them; recognised by their form.

Each of the later ones samples one pixel where it is told to (``method="discrete"``), and clamps x by the level's
height. Ports have mended this, and so there is a class for either; the comparison with the original decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from .attention import attend_by_level, attend_in_boxes
from .probe import Probe
from .replacement import Accelerated

PREDICTIONS = ("sampling_offsets", "attention_weights")
PROJECTIONS = ("value_proj", "output_proj")


class RTDetr(Accelerated):
    """RT-DETR: the same number of points in each level; the mask is a factor of the value."""

    names = ("MSDeformableAttention",)
    attributes = (*PREDICTIONS, *PROJECTIONS, "num_heads", "num_levels", "num_points")

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, channels = module.num_levels, module.embed_dim
        yield {
            "query": probe.queries(channels),
            "reference_points": probe.references(1, 4),
            "value": probe.rows(levels, channels),
            "value_spatial_shapes": probe.shapes(levels),
            "value_mask": probe.half(levels),
        }

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        value_spatial_shapes: list,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        output, _ = attend_by_level(
            self,
            (self.num_heads, self.num_levels, self.num_points),
            query,
            value,
            None if value_mask is None else value_mask == 0,
            reference_points,
            value_spatial_shapes,
        )
        return output


class _PointsALevel(Accelerated):
    """What the modules share whose levels have different numbers of points."""

    names = ("MSDeformableAttention",)
    attributes: ClassVar[tuple[str, ...]] = (
        *PREDICTIONS,
        "num_heads",
        "num_points_list",
        "num_points_scale",
        "offset_scale",
        "method",
    )
    discrete: ClassVar[str] = "discrete_by_height"

    def _attend(self, query: Tensor, value: Any, reference_points: Tensor, shapes: list) -> Tensor:
        output, _ = attend_in_boxes(
            self,
            self.num_heads,
            self.num_points_list,
            query,
            value,
            reference_points,
            shapes,
            self.num_points_scale * self.offset_scale,
            self.discrete if self.method == "discrete" else self.method,
        )
        return output


class RTDetrV2(_PointsALevel):
    """RT-DETRv2: the value is projected here."""

    attributes = (*_PointsALevel.attributes, *PROJECTIONS)

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, channels = len(module.num_points_list), module.embed_dim
        yield {
            "query": probe.queries(channels),
            "reference_points": probe.references(1, 4),
            "value": probe.rows(levels, channels),
            "value_spatial_shapes": probe.shapes(levels),
            "value_mask": probe.half(levels),
        }

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        value_spatial_shapes: list,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        value = self.value_proj(value)
        if value_mask is not None:
            value = value * value_mask.to(value.dtype)[..., None]
        value = value.unflatten(-1, (self.num_heads, -1))
        return self.output_proj(self._attend(query, value, reference_points, value_spatial_shapes))


class RTDetrV2InBounds(RTDetrV2):
    """The same with x clamped into the level."""

    discrete = "discrete"


class DFine(_PointsALevel):
    """D-FINE and DEIM: the value comes as a list with a tensor (N, heads, channels, rows) for each level."""

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, heads = len(module.num_points_list), module.num_heads
        shapes = probe.shapes(levels)
        value = probe.rows(levels, heads, module.embed_dim // heads).permute(0, 2, 3, 1)
        yield {
            "query": probe.queries(module.embed_dim),
            "reference_points": probe.references(1, 4),
            "value": value.split([height * width for height, width in shapes], -1),
            "value_spatial_shapes": shapes,
        }

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: list[Tensor],
        value_spatial_shapes: list,
    ) -> Tensor:
        return self._attend(query, value, reference_points, value_spatial_shapes)


class DFineInBounds(DFine):
    """The same with x clamped into the level."""

    discrete = "discrete"
