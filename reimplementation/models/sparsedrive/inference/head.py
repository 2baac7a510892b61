"""A head whose layers are in their form for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.deformable import DeformableFeatureAggregation
from reimplementation.models.sparsedrive.anchor_encoder import BoxAnchorEncoder
from reimplementation.models.sparsedrive.attention import InstanceAttention
from reimplementation.models.sparsedrive.denoising import Denoising
from reimplementation.models.sparsedrive.ffn import AsymmetricFFN
from reimplementation.models.sparsedrive.head import Memory, SparseHead
from reimplementation.models.sparsedrive.instance_bank import Recalled, TemporalState
from reimplementation.models.sparsedrive.refinement import BoxRefinement, Refinement
from reimplementation.ops.autocast import without_autocast

from .aggregation import CAMERA_LOGITS, CameraLogits, InferenceAggregation
from .anchors import InferenceBoxEncoder
from .attention import InferenceAttention
from .rows import InferenceFFN, Rows

MASK_ALIGNMENT = 8  # numbers; kernels of attention copy masks whose rows begin elsewhere


class InferenceHead(SparseHead):
    """`SparseHead` with the layers of another one, which it takes over and converts.

    Args:
        head: in evaluation; of no use afterwards.
        dtype: of features.
    """

    def __init__(self, head: SparseHead, dtype: torch.dtype):
        nn.Module.__init__(self)  # there are no layers to build
        self.config, self.decoupled, self.operations = head.config, head.decoupled, head.operations
        self.instance_bank = head.instance_bank
        self.instance_bank.instance_feature.data = self.instance_bank.instance_feature.to(dtype)
        anchors = self.instance_bank.anchor.dtype
        encoder: Any = head.anchor_encoder
        if isinstance(encoder, BoxAnchorEncoder):
            self.anchor_encoder = InferenceBoxEncoder(encoder, dtype)
        else:
            self.anchor_encoder = Rows(encoder.pos_fc, dtype, first=anchors)
        aggregations = [layer for layer in head.layers if isinstance(layer, DeformableFeatureAggregation)]
        self.camera_logits = CameraLogits(aggregations, dtype)
        self.layers = nn.ModuleList(_converted(layer, head, aggregations, dtype) for layer in head.layers)
        if head.decoupled:
            self.fc_before = head.fc_before.to(dtype)
        self.eval()

    def train(self, mode: bool = True) -> InferenceHead:
        """RuntimeError where training is asked for."""
        if mode:
            raise RuntimeError("a form for inference does not train; train the model that it was made from")
        return super().train(mode)

    def forward(
        self,
        feature_maps: Sequence[Tensor],
        metas: Mapping[str, Any],
        state: TemporalState | None = None,
        denoising: Denoising | None = None,
        every_layer: bool = True,
    ) -> tuple[dict, TemporalState | None]:
        """As of `SparseHead`; autocast, which would round anchors, changes nothing."""
        with without_autocast(feature_maps[0].device):
            metas = {**metas, CAMERA_LOGITS: self.camera_logits(metas["projection_mat"])}
            return super().forward(feature_maps, metas, state, denoising, every_layer)

    def _memory(self, recalled: Recalled, num_keys: int, within: Tensor | None) -> Memory:
        """With a mask that attention's kernels take as it is: added to the products, in rows that are aligned."""
        memory = super()._memory(recalled, num_keys, within)
        allowed = F.pad(memory.allowed, (0, -num_keys % MASK_ALIGNMENT))
        added = torch.where(allowed, 0.0, -torch.inf).to(memory.feature.dtype)
        return memory._replace(allowed=added[..., :num_keys])

    def _attend(self, layer: nn.Module, feature: Tensor, embed: Tensor, allowed: Tensor | None) -> Tensor:
        if isinstance(layer, InferenceAttention):
            return layer.of_own(self._query(feature, embed), feature, allowed)
        return super()._attend(layer, feature, embed, allowed)

    def _attend_to_memory(
        self, layer: nn.Module, feature: Tensor, embed: Tensor, memory: Memory | None, allowed: Tensor | None
    ) -> Tensor:
        if not isinstance(layer, InferenceAttention):
            return super()._attend_to_memory(layer, feature, embed, memory, allowed)
        query = key = value = self._query(feature, embed)
        if memory is not None:
            key = self._query(torch.where(memory.goes_on, memory.feature, feature), embed)
            value = torch.where(memory.goes_on, memory.value, query)
            allowed = memory.allowed
        return layer(query, key, value, allowed)


def _converted(
    layer: nn.Module, head: SparseHead, aggregations: list[DeformableFeatureAggregation], dtype: torch.dtype
) -> nn.Module:
    if isinstance(layer, DeformableFeatureAggregation):
        return InferenceAggregation(layer, aggregations.index(layer), dtype)
    if isinstance(layer, Refinement):
        layer.layers, layer.cls_layers = Rows(layer.layers, dtype), Rows(layer.cls_layers, dtype)
        if isinstance(layer, BoxRefinement):
            layer.quality_layers = Rows(layer.quality_layers, dtype)
        return layer
    if isinstance(layer, AsymmetricFFN):
        return InferenceFFN(layer).to(dtype)
    if isinstance(layer, InstanceAttention) and head.decoupled:
        return InferenceAttention(layer, head.fc_before.weight, head.fc_after.weight).to(dtype)
    return layer.to(dtype)
