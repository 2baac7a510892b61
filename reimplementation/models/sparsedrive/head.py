"""The sparse head: decoder layers over instances, the same for boxes and for map lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.deformable import (
    DeformableFeatureAggregation,
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)

from .anchor_encoder import BoxAnchorEncoder, LineAnchorEncoder
from .attention import InstanceAttention
from .config import BoxHeadConfig, MapHeadConfig, SparseDriveConfig
from .denoising import Denoising
from .ffn import AsymmetricFFN
from .geometry import spread_boxes, spread_lines
from .instance_bank import InstanceBank, Recalled, TemporalState
from .refinement import BoxRefinement, LineRefinement

ANCHOR_HANDLERS = {"sparsedrive": SparseBox3DKeyPointsGenerator, "sparse4d": Sparse4DBox3DKeyPointsGenerator}
LAYER = ("gnn", "norm", "deformable", "ffn", "norm", "refine")


class Memory(NamedTuple):
    """What ``temp_gnn`` looks at: recalled instances, which stand first among the n of a layer.

    feature   (bs, n, embed_dims), as they were in the last frame
    value     (bs, n, attention_dims)
    goes_on   (bs, 1, 1) bool; False: the sample starts anew and looks at its own instances instead
    allowed   (bs, 1, 1 or n, n) bool: which keys a query may look at
    """

    feature: Tensor
    value: Tensor
    goes_on: Tensor
    allowed: Tensor


class SparseHead(nn.Module):
    """Instances, refined by decoder layers: attention, deformable aggregation, feed-forward network, refinement.

    Args:
        config: the detector.
        head: the head's part of it.
        bank: the instances.
        anchor_encoder: a module from anchors to embeddings.
        key_points: a dict that describes the key point generator of each aggregation.
        refinement: makes the module at the end of a layer.
        decoupled: attention on features and embeddings side by side instead of their sum (Sparse4Dv3, section 3.3).
        first_gnn: whether the first layer begins with attention too. Before it, features that start equal have
            nothing to tell one another.
    """

    def __init__(
        self,
        config: SparseDriveConfig,
        head: BoxHeadConfig | MapHeadConfig,
        bank: InstanceBank,
        anchor_encoder: nn.Module,
        key_points: Mapping,
        refinement: Callable[[int, int], nn.Module],
        decoupled: bool,
        first_gnn: bool,
    ):
        super().__init__()
        self.config = head
        self.decoupled = decoupled
        self.operations = operations(head.num_decoders, head.num_single_frame_decoders, first_gnn)
        self.instance_bank = bank
        self.anchor_encoder = anchor_encoder
        dims, attention_dims = config.embed_dims, config.embed_dims * (2 if decoupled else 1)
        make = {
            "gnn": lambda: InstanceAttention(attention_dims, config.num_heads, config.dropout),
            "norm": lambda: nn.LayerNorm(dims),
            "deformable": lambda: _aggregation(config, key_points),
            "ffn": lambda: AsymmetricFFN(2 * dims, dims, config.feedforward_dims, config.dropout),
            "refine": lambda: refinement(dims, len(head.classes)),
        }
        make["temp_gnn"] = make["gnn"]
        self.layers = nn.ModuleList(make[operation]() for operation in self.operations)
        if decoupled:
            self.fc_before = nn.Linear(dims, attention_dims, bias=False)
            self.fc_after = nn.Linear(attention_dims, dims, bias=False)

    def forward(
        self,
        feature_maps: Sequence[Tensor],
        metas: Mapping[str, Tensor],
        state: TemporalState | None = None,
        denoising: Denoising | None = None,
        every_layer: bool = True,
    ) -> tuple[dict, TemporalState | None]:
        """Detect.

        Args:
            feature_maps: what `ops.feature_maps_format` returns.
            metas: as the detector takes them; ``timestamp`` and ``T_global`` float64.
            state: of the last frame; None: there was none.
            denoising: further queries, which the others do not see.
            every_layer: whether the layers that nothing follows from predict classes and quality too; the lists hold
                None there if not.

        Returns:
            ``classification``, ``prediction`` and ``quality``, each a list with an entry a layer: logits (bs, n,
            num_classes), anchors (bs, n, anchor_dims) and logits (bs, n, 2) or None; ``instance_id`` (bs, n) where
            the head remembers; ``denoising``, where there was some: the three lists of those queries, their last
            ``feature``, and ``targets``, an entry a layer. And the state for the next frame, None where the head
            remembers nothing.
        """
        bank, num_anchors = self.instance_bank, self.instance_bank.config.num_anchors
        recalled = None if state is None else bank.recall(state, metas["timestamp"], metas["T_global"])
        time_interval = bank.config.default_time_interval if recalled is None else recalled.time_interval
        feature, anchor = bank.start(len(metas["projection_mat"]))
        within = None
        if denoising is not None:
            feature, anchor, within = denoising.append_to(feature, anchor)
        embed = self.anchor_encoder(anchor)
        memory = None if recalled is None else self._memory(recalled, anchor.shape[1], within)

        layers: list[tuple[Tensor | None, Tensor, Tensor | None]] = []
        for operation, layer in zip(self.operations, self.layers):
            if operation == "gnn":
                feature = self._attend(layer, feature, embed, within)
            elif operation == "temp_gnn":
                feature = self._attend_to_memory(layer, feature, embed, memory, within)
            elif operation == "deformable":
                feature = layer(feature, anchor, embed, feature_maps, metas)
            elif operation in ("norm", "ffn"):
                feature = layer(feature)
            else:
                depth = len(layers) + 1
                ends = depth == self.config.num_decoders
                merging = recalled if depth == self.config.num_single_frame_decoders else None
                classify = every_layer or ends or merging is not None
                anchor, logits, quality = layer(feature, anchor, embed, time_interval, classify)
                layers.append((logits, anchor, quality))
                if merging is not None:
                    feature, anchor = self._merge(merging, feature, anchor, logits, denoising)
                if not ends:
                    embed = self.anchor_encoder(anchor)

        outputs = _lists([[_first(part, num_anchors) for part in layer] for layer in layers])
        if denoising is not None:
            noisy = _lists([[_after(part, num_anchors) for part in layer] for layer in layers])
            targets = denoising.targets_of_layers(len(layers), self.config.num_single_frame_decoders)
            outputs["denoising"] = {**noisy, "feature": feature[:, num_anchors:], "targets": targets}
        if bank.config.num_temp_instances == 0:
            return outputs, None
        outputs["instance_id"], state = bank.keep(
            recalled,
            feature[:, :num_anchors],
            outputs["prediction"][-1],
            outputs["classification"][-1],
            metas["timestamp"],
            metas["T_global"],
        )
        return outputs, state

    def _memory(self, recalled: Recalled, num_keys: int, within: Tensor | None) -> Memory:
        """Recalled instances as keys: of ``num_keys`` the first, or all of one's own where a sample starts anew."""
        kept = recalled.feature.shape[1]
        is_recalled = torch.arange(num_keys, device=recalled.feature.device) < kept
        goes_on = recalled.goes_on[:, None, None]
        of_own = ~goes_on[..., None]
        allowed = (goes_on[..., None] & is_recalled) | (of_own if within is None else of_own & within)
        feature = F.pad(recalled.feature, (0, 0, 0, num_keys - kept))
        return Memory(feature, self._value(feature), goes_on, allowed)

    def _merge(
        self, recalled: Recalled, feature: Tensor, anchor: Tensor, logits: Tensor, denoising: Denoising | None
    ) -> tuple[Tensor, Tensor]:
        """The bank merges the frame's own instances; denoising queries, behind them, have a merger of theirs."""
        if denoising is None:
            return self.instance_bank.merge(recalled, feature, anchor, logits)
        sizes = (self.instance_bank.config.num_anchors, denoising.anchor.shape[1])
        (feature, noisy_feature), (anchor, noisy_anchor) = feature.split(sizes, dim=1), anchor.split(sizes, dim=1)
        merged = self.instance_bank.merge(recalled, feature, anchor, logits[:, : sizes[0]])
        noisy = denoising.merge(noisy_feature, noisy_anchor)
        return torch.cat([merged[0], noisy[0]], dim=1), torch.cat([merged[1], noisy[1]], dim=1)

    def _attend(self, layer: nn.Module, feature: Tensor, embed: Tensor, allowed: Tensor | None) -> Tensor:
        """Instances look at one another."""
        query = self._query(feature, embed)
        attended = layer(query if self.decoupled else feature, query, query, self._value(feature), allowed)
        return self.fc_after(attended) if self.decoupled else attended

    def _attend_to_memory(
        self,
        layer: nn.Module,
        feature: Tensor,
        embed: Tensor,
        memory: Memory | None,
        allowed: Tensor | None,
    ) -> Tensor:
        """Instances look at the recalled ones; where there are none, at one another.

        The recalled ones have their old features, and the places that the layers before found for them. Where there are
        none, the decoupled value is the query itself, without ``fc_before``: so were the networks trained.
        """
        query = self._query(feature, embed)
        residual = query if self.decoupled else feature
        key, value = query, residual
        if memory is not None:
            key = self._query(torch.where(memory.goes_on, memory.feature, feature), embed)
            value = torch.where(memory.goes_on, memory.value, value)
            allowed = memory.allowed
        attended = layer(residual, query, key, value, allowed)
        return self.fc_after(attended) if self.decoupled else attended

    def _query(self, feature: Tensor, embed: Tensor) -> Tensor:
        return torch.cat([feature, embed], dim=-1) if self.decoupled else feature + embed

    def _value(self, feature: Tensor) -> Tensor:
        return self.fc_before(feature) if self.decoupled else feature


def operations(num_decoders: int, num_single_frame_decoders: int, first_gnn: bool) -> list[str]:
    """The kinds of a head's layers in order; their places in it are the numbers in the parameters' names."""
    single = list(LAYER) * num_single_frame_decoders
    temporal = ["temp_gnn", *LAYER] * (num_decoders - num_single_frame_decoders)
    return (single if first_gnn else single[2:]) + temporal


def box_head(config: SparseDriveConfig) -> SparseHead:
    """The head for boxes that a configuration describes."""
    head = config.det
    bank = InstanceBank(
        head.bank,
        spread_boxes(head.bank.num_anchors, head.max_distance),
        config.embed_dims,
        ANCHOR_HANDLERS[config.family](config.embed_dims),
    )
    key_points = {
        "type": SparseBox3DKeyPointsGenerator,
        "num_learnable_pts": head.num_learnable_pts,
        "fix_scale": head.fix_scale,
    }
    encoder = BoxAnchorEncoder(config.embed_dims)
    return SparseHead(config, head, bank, encoder, key_points, BoxRefinement, decoupled=True, first_gnn=False)


def line_head(config: SparseDriveConfig) -> SparseHead:
    """The head for map lines that a configuration describes."""
    head = config.map
    if head is None:
        raise ValueError("this configuration has no map head: its map is None")
    bank = InstanceBank(
        head.bank,
        spread_lines(head.bank.num_anchors, head.num_points, head.extent),
        config.embed_dims,
        SparsePoint3DKeyPointsGenerator(config.embed_dims, head.num_points),
        learns_feature=True,
    )
    key_points = {
        "type": SparsePoint3DKeyPointsGenerator,
        "num_sample": head.num_points,
        "num_learnable_pts": head.num_learnable_pts,
        "fix_height": head.fix_height,
        "ground_height": head.ground_height,
    }
    encoder = LineAnchorEncoder(head.num_points, config.embed_dims)

    def refinement(embed_dims: int, num_classes: int) -> LineRefinement:
        return LineRefinement(embed_dims, 2 * head.num_points, num_classes)

    return SparseHead(config, head, bank, encoder, key_points, refinement, decoupled=False, first_gnn=True)


def _aggregation(config: SparseDriveConfig, key_points: Mapping) -> DeformableFeatureAggregation:
    module = DeformableFeatureAggregation(
        config.embed_dims,
        config.num_groups,
        config.num_levels,
        config.num_cams,
        attn_drop=config.attn_drop,
        kps_generator=key_points,
        use_deformable_func=config.use_deformable_func,
        use_camera_embed=True,
        residual_mode="cat",
    )
    module.init_weight()
    module.kps_generator.init_weight()
    return module


def _lists(layers: Sequence[Sequence[Tensor | None]]) -> dict:
    classification, prediction, quality = (list(parts) for parts in zip(*layers))
    return {"classification": classification, "prediction": prediction, "quality": quality}


def _first(x: Tensor | None, count: int) -> Tensor | None:
    return x if x is None or x.shape[1] == count else x[:, :count]


def _after(x: Tensor | None, count: int) -> Tensor | None:
    return None if x is None else x[:, count:]
