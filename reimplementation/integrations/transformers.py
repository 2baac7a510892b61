"""Attention modules of Hugging Face transformers 5: a forward for each list of parameters that they come with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from reimplementation import ops

from .attention import attend_by_level, attend_in_boxes
from .probe import Probe
from .replacement import Accelerated, Needed

NAMES = ("*MultiscaleDeformableAttention", "*MultiScaleDeformableAttention")
LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def _sizes(module: Any) -> tuple[int, int, int]:
    return module.n_heads, module.n_levels, module.n_points


def _with_position(hidden_states: Tensor, position_embeddings: Tensor | None) -> Tensor:
    return hidden_states if position_embeddings is None else hidden_states + position_embeddings


class _ByLevel(Accelerated):
    """What the modules share that have the same number of points in each level."""

    names = NAMES
    attributes = (*LAYERS, "n_heads", "n_levels", "n_points")
    ignored = ("output_attentions",)
    shapes_in: ClassVar[tuple[str, ...]] = ("spatial_shapes", "spatial_shapes_list")

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if hasattr(module, "n_points_list"):
            return "it has numbers of points for each level"
        return super().why_not(module)

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, channels = module.n_levels, module.d_model
        shapes, starts = probe.shapes_in_tensors(levels)
        given = {"spatial_shapes": shapes, "spatial_shapes_list": probe.shapes(levels)}
        for coordinates, mask in ((2, probe.half(levels)), (4, None)):
            yield {
                "hidden_states": probe.queries(channels),
                "attention_mask": mask,
                "encoder_hidden_states": probe.rows(levels, channels),
                "position_embeddings": probe.queries(channels),
                "reference_points": probe.references(levels, coordinates),
                "level_start_index": starts,
                **{name: given[name] for name in cls.shapes_in},
            }


class Detector(_ByLevel):
    """Deformable DETR, RT-DETR, Grounding DINO, OmDet-Turbo, LW-DETR, RF-DETR, PP-DocLayout: masks say what counts."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Needed = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        spatial_shapes_list: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = _with_position(hidden_states, position_embeddings)
        padding = None if attention_mask is None else ~attention_mask
        shapes = spatial_shapes if spatial_shapes_list is None else spatial_shapes_list
        return attend_by_level(self, _sizes(self), query, encoder_hidden_states, padding, reference_points, shapes)


class Mask2FormerPixelDecoder(_ByLevel):
    """The pixel decoder of Mask2Former: the mask says what does not count, and shapes are a list."""

    shapes_in = ("spatial_shapes_list",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Needed = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes_list: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = _with_position(hidden_states, position_embeddings)
        return attend_by_level(
            self, _sizes(self), query, encoder_hidden_states, attention_mask, reference_points, spatial_shapes_list
        )


class OneFormerPixelDecoder(_ByLevel):
    """The pixel decoder of OneFormer: likewise, and shapes are a tensor."""

    shapes_in: ClassVar[tuple[str, ...]] = ("spatial_shapes",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Needed = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = _with_position(hidden_states, position_embeddings)
        return attend_by_level(
            self,
            _sizes(self),
            query,
            encoder_hidden_states,
            attention_mask,
            reference_points,
            spatial_shapes,
            level_start_index,
        )


class OneFormerPixelDecoderWithList(OneFormerPixelDecoder):
    """The same as it came later, with the shapes as a list besides."""

    shapes_in = ("spatial_shapes", "spatial_shapes_list")

    def forward(  # type: ignore[override]  # who calls it knows which of the two it is
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Needed = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
        spatial_shapes_list: Needed = None,
    ) -> tuple[Tensor, Tensor | None]:
        query = _with_position(hidden_states, position_embeddings)
        return attend_by_level(
            self, _sizes(self), query, encoder_hidden_states, attention_mask, reference_points, spatial_shapes_list
        )


class RTDetrV2(Accelerated):
    """RT-DETRv2: boxes, and a number of points for each level."""

    names = NAMES
    attributes = (*LAYERS, "n_heads", "n_points_list", "n_points_scale", "offset_scale", "method")

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, channels = len(module.n_points_list), module.d_model
        shapes, starts = probe.shapes_in_tensors(levels)
        yield {
            "hidden_states": probe.queries(channels),
            "attention_mask": probe.half(levels),
            "encoder_hidden_states": probe.rows(levels, channels),
            "position_embeddings": probe.queries(channels),
            "reference_points": probe.references(1, 4),
            "spatial_shapes": shapes,
            "spatial_shapes_list": probe.shapes(levels),
            "level_start_index": starts,
        }

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Needed = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Needed = None,
        spatial_shapes: Needed = None,
        spatial_shapes_list: Needed = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(~attention_mask[..., None], 0)
        output, weights = attend_in_boxes(
            self,
            self.n_heads,
            self.n_points_list,
            _with_position(hidden_states, position_embeddings),
            value.unflatten(-1, (self.n_heads, -1)),
            reference_points,
            spatial_shapes_list,
            self.n_points_scale * self.offset_scale,
            self.method,
        )
        return self.output_proj(output), weights


class DFine(Accelerated):
    """D-FINE and DEIMv2: boxes, a number of points for each level, and features that nothing projects."""

    names = NAMES
    attributes = (
        "sampling_offsets",
        "attention_weights",
        "n_heads",
        "num_points_list",
        "num_points_scale",
        "offset_scale",
        "decoder_method",
    )

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        levels, channels = len(module.num_points_list), module.d_model
        yield {
            "hidden_states": probe.queries(channels),
            "attention_mask": None,  # the original cannot apply one: its mask has a dimension too few
            "encoder_hidden_states": probe.rows(levels, channels),
            "reference_points": probe.references(1, 4),
            "spatial_shapes": probe.shapes_in_tensors(levels)[0],
            "spatial_shapes_list": probe.shapes(levels),
        }

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        reference_points: Needed = None,
        encoder_hidden_states: Needed = None,
        spatial_shapes: Needed = None,
        spatial_shapes_list: Needed = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        value = encoder_hidden_states.unflatten(-1, (self.n_heads, -1))
        if attention_mask is not None:
            value = value.masked_fill(~attention_mask[..., None], 0)
        return attend_in_boxes(
            self,
            self.n_heads,
            self.num_points_list,
            hidden_states,
            value,
            reference_points,
            spatial_shapes_list,
            self.num_points_scale * self.offset_scale,
            self.decoder_method,
        )


class Core(Accelerated):
    """The op alone, in a module of which nothing else is known; its class has no parameters."""

    names = ("MultiScaleDeformableAttention",)
    attributes = ()

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        shapes, starts = probe.shapes_in_tensors(2)
        value = probe.rows(2, 3, 4)
        samples = (value.shape[0], 5, 3, 2, 4)
        yield {
            "value": value,
            "value_spatial_shapes": shapes,
            "value_spatial_shapes_list": probe.shapes(2),
            "level_start_index": starts,
            "sampling_locations": probe.uniform(*samples, 2) * 1.4 - 0.2,
            "attention_weights": probe.normal(*samples),
            "im2col_step": 64,
        }

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return ops.ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)
