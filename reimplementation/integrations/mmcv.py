"""The module ``MultiScaleDeformableAttention`` of mmcv, mmcv-lite and onedl-mmcv, and GroundingDINO's, made after it.

Both are recognised by their form; neither package is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from .attention import attend_by_level
from .probe import Probe
from .replacement import Accelerated, Needed


class GroundingDino(Accelerated):
    """GroundingDINO: queries first unless ``batch_first``, and nothing is added to the output."""

    names = ("MultiScaleDeformableAttention",)
    attributes: ClassVar[tuple[str, ...]] = (
        "sampling_offsets",
        "attention_weights",
        "value_proj",
        "output_proj",
        "batch_first",
        "num_heads",
        "num_levels",
        "num_points",
    )
    ignored = ("key",)  # which the originals take and do not read

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels = module.num_levels
        channels = module.sampling_offsets.in_features
        shapes, starts = probe.shapes_in_tensors(levels)
        for coordinates, mask in ((2, probe.half(levels)), (4, None)):
            query, position, value = probe.queries(channels), probe.queries(channels), probe.rows(levels, channels)
            if not module.batch_first:
                query, position, value = (given.transpose(0, 1) for given in (query, position, value))
            yield {
                "query": query,
                "value": value,
                "query_pos": position,
                "key_padding_mask": mask,
                "reference_points": probe.references(levels, coordinates),
                "spatial_shapes": shapes,
                "level_start_index": starts,
            }

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        value = query if value is None else value
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        output, _ = attend_by_level(
            self,
            (self.num_heads, self.num_levels, self.num_points),
            query,
            value,
            key_padding_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )
        return output if self.batch_first else output.transpose(0, 1)


class Mmcv(GroundingDino):
    """mmcv: the query, or what is given as ``identity``, is added to the output after dropout."""

    attributes = (*GroundingDino.attributes, "dropout")

    def forward(  # type: ignore[override]  # who calls it knows which of the two it is
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        output = GroundingDino.forward(
            self, query, key, value, query_pos, key_padding_mask, reference_points, spatial_shapes, level_start_index
        )
        return self.dropout(output) + (query if identity is None else identity)
