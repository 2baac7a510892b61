"""The module around the op: key points, projection, weights, aggregation, residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation import ops
from reimplementation.models.checks import check_positive
from reimplementation.ops.dtypes import as_dtype

from .arguments import Arguments, Sizes, cameras, checked
from .key_points import SparseBox3DKeyPointsGenerator, check_key_points
from .one_node import aggregate
from .plain_tensors import plain_tensors, settings_of
from .plugins import build

RESIDUAL_MODES = ("add", "cat", None)


class DeformableFeatureAggregation(nn.Module):
    """Gather image features for 3D queries at their key points.

    Each query places key points around its anchor, projects them into every camera, samples every level of
    the feature pyramid there and sums with weights that the query predicts: per channel group one softmax
    over all cameras, levels and points. This is the deformable aggregation of Sparse4D (arXiv:2211.10581,
    arXiv:2305.14018) as SparseDrive (arXiv:2405.19620) uses it; the parameters have its names.

    Args:
        embed_dims: channels of queries and feature maps.
        num_groups: channel groups with weights of their own; divides ``embed_dims``.
        num_levels: levels of the feature pyramid.
        num_cams: cameras.
        proj_drop: dropout of the projected output, in [0, 1].
        attn_drop: in training, the share of (camera, point) pairs left out of a query's sum, in [0, 1).
        kps_generator: the key points: a module called as ``(anchor, instance_feature)`` and knowing its
            ``num_pts``; or a dict of its arguments, with its class under ``"type"``, or the name of one of
            this package's. Default: `SparseBox3DKeyPointsGenerator` with the centre alone.
        temporal_fusion_module: likewise, kept as ``temp_module`` for the caller; not called here.
        use_temporal_anchor_embed: kept for the caller; not used here.
        use_deformable_func: run the best backend there is for the tensors' device. False: always plain
            PyTorch; the numbers are the same.
        use_camera_embed: let the weights depend on each camera's projection matrix.
        residual_mode: "add" the instance feature to the output, "cat" it behind the output, or None.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: ``kps_generator`` or ``temporal_fusion_module`` is neither a module nor a dict with a type.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_groups: int = 8,
        num_levels: int = 4,
        num_cams: int = 6,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        kps_generator: Mapping | nn.Module | None = None,
        temporal_fusion_module: Mapping | nn.Module | None = None,
        use_temporal_anchor_embed: bool = True,
        use_deformable_func: bool = False,
        use_camera_embed: bool = False,
        residual_mode: str | None = "add",
    ):
        super().__init__()
        check_positive(embed_dims=embed_dims, num_groups=num_groups, num_levels=num_levels, num_cams=num_cams)
        if embed_dims % num_groups != 0:
            raise ValueError(f"embed_dims must be divisible by num_groups; got {embed_dims} and {num_groups}")
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop must be in [0, 1); got {attn_drop}")
        if residual_mode not in RESIDUAL_MODES:
            raise ValueError(f"residual_mode must be one of {RESIDUAL_MODES}; got {residual_mode!r}")
        self.embed_dims = embed_dims
        self.num_groups = num_groups
        self.group_dims = embed_dims // num_groups
        self.num_levels = num_levels
        self.num_cams = num_cams
        self.attn_drop = attn_drop
        self.use_temporal_anchor_embed = use_temporal_anchor_embed
        self.use_deformable_func = use_deformable_func
        self.residual_mode = residual_mode

        self.proj_drop = nn.Dropout(proj_drop)
        if kps_generator is None:
            kps_generator = {"type": SparseBox3DKeyPointsGenerator}
        generator: Any = build("kps_generator", kps_generator, overrides={"embed_dims": embed_dims})
        self.kps_generator = generator
        self.num_pts: int = generator.num_pts
        if self.num_pts < 1:
            raise ValueError(f"kps_generator must place at least one key point; got num_pts={self.num_pts}")
        self.temp_module = None
        if temporal_fusion_module is not None:
            self.temp_module = build(
                "temporal_fusion_module", temporal_fusion_module, defaults={"embed_dims": embed_dims}
            )
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        num_weights = num_groups * num_levels * self.num_pts
        if use_camera_embed:
            self.camera_encoder: nn.Module | None = nn.Sequential(
                nn.Linear(12, embed_dims),
                nn.ReLU(inplace=True),
                nn.LayerNorm(embed_dims),
                nn.Linear(embed_dims, embed_dims),
                nn.ReLU(inplace=True),
                nn.LayerNorm(embed_dims),
            )
            self.weights_fc = nn.Linear(embed_dims, num_weights)
        else:
            self.camera_encoder = None
            self.weights_fc = nn.Linear(embed_dims, num_cams * num_weights)

    def init_weight(self) -> None:
        """Equal weights everywhere, a Xavier output projection. The caller's to call, as in SparseDrive."""
        nn.init.zeros_(self.weights_fc.weight)
        nn.init.zeros_(self.weights_fc.bias)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(
        self,
        instance_feature: Tensor,
        anchor: Tensor,
        anchor_embed: Tensor,
        feature_maps: Sequence,
        metas: Mapping,
        **kwargs,
    ) -> Tensor:
        """Aggregate features for every query.

        Args:
            instance_feature: (bs, num_anchor, embed_dims).
            anchor: (bs, num_anchor, anchor_dims), as the key point generator takes it.
            anchor_embed: (bs, num_anchor, embed_dims), or a shape that broadcasts to it.
            feature_maps: what `ops.feature_maps_format` returns, ``[col_feats, spatial_shape,
                scale_start_index]``; or what it takes, a list of (bs, num_cams, embed_dims, H, W), one per
                level. Several modules that read the same maps had better share the former. May be in half
                precision while the module is not.
            metas: ``"projection_mat"`` (bs, num_cams, 4, 4), from the anchors' frame to pixels (see
                `ops.project_points`), and ``"image_wh"`` (bs, num_cams, 2) in pixels, absent or None where the
                matrix goes to normalised coordinates already.
            kwargs: ignored, for callers that pass every module the same arguments.

        Returns:
            (bs, num_anchor, embed_dims); with residual mode "cat" (bs, num_anchor, 2 * embed_dims). Where its layers
            are as it built them, with no hooks, and all but the feature maps is float32, so is what it returns, under
            autocast too.

        Raises:
            KeyError: ``metas`` has no ``"projection_mat"``.
            ValueError: an argument has the wrong shape.
            TypeError: an argument has the wrong type.
        """
        given = Arguments(instance_feature, anchor, anchor_embed, feature_maps, *cameras(metas))
        arguments = checked(given, Sizes(self.embed_dims, self.num_cams, self.num_levels))
        keep = self._keep(instance_feature)
        tensors = plain_tensors(self, arguments, keep)
        if tensors is None:
            return self._layer_by_layer(arguments, keep)
        try:
            return aggregate(settings_of(self), tensors)
        except RuntimeError:
            self._layer_by_layer(arguments, keep)  # which says in better words what is wrong with its arguments
            raise

    def _layer_by_layer(self, arguments: Arguments, keep: Tensor | None) -> Tensor:
        """The forward, each part of it called: what hooks, adapters, autocast, compilers and exporters see."""
        instance_feature, anchor, anchor_embed, feature_maps, projection_mat, image_wh = arguments
        col_feats, spatial_shape, scale_start_index = feature_maps
        with nullcontext() if self.use_deformable_func else ops.use_backend("grid_sample"):
            key_points = self.kps_generator(anchor, instance_feature)
            check_key_points(key_points, instance_feature, self.num_pts)
            logits, camera_logits = self._logits(instance_feature + anchor_embed, projection_mat)
            dtype = torch.promote_types(logits.dtype, col_feats.dtype)
            features = ops.deformable_feature_aggregation(
                col_feats,
                spatial_shape,
                scale_start_index,
                key_points,
                projection_mat,
                image_wh,
                as_dtype(logits, dtype),
                None if camera_logits is None else as_dtype(camera_logits, dtype),
                keep,
                self.attn_drop,
            )
        output = self.proj_drop(self.output_proj(as_dtype(features, instance_feature.dtype)))
        if self.residual_mode == "add":
            output = output + instance_feature
        elif self.residual_mode == "cat":
            output = torch.cat([output, instance_feature], dim=-1)
        return output

    def _logits(self, feature: Tensor, projection_mat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the weights of queries (bs, num_anchor, C) as the op takes them, and the cameras' term or None."""
        if self.camera_encoder is None:
            return self.weights_fc(feature), None
        bs = feature.shape[0]
        # As one matrix: where more dimensions are not contiguous, a linear layer adds its bias in another kernel.
        matrices = projection_mat[:, :, :3].reshape(bs * self.num_cams, 12)
        camera_embed = self.camera_encoder(as_dtype(matrices, feature.dtype))
        if type(self.weights_fc) is nn.Linear:  # of a sum: once a query, once a camera, and not once a pair
            of_camera = F.linear(camera_embed, self.weights_fc.weight)
            return self.weights_fc(feature), of_camera.view(bs, self.num_cams, self.weights_fc.out_features)
        # Quantised, say, or adapted.
        of_pairs = feature[:, :, None] + camera_embed.view(bs, 1, self.num_cams, self.embed_dims)
        return self.weights_fc(of_pairs).flatten(2), None

    def _keep(self, instance_feature: Tensor) -> Tensor | None:
        """What attention dropout leaves, if there is any: (bs, num_anchor, num_cams, num_pts).

        One draw for all levels and groups of a pair, so that a dropped point is unseen by that camera.
        """
        if not self.training or self.attn_drop == 0:
            return None
        pairs = (*instance_feature.shape[:2], self.num_cams, self.num_pts)
        return torch.empty(pairs, dtype=torch.bool, device=instance_feature.device).bernoulli_(1 - self.attn_drop)

    @staticmethod
    def project_points(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None) -> Tensor:
        """`ops.project_points` camera by camera: (bs, num_cams, num_anchor, num_pts, 2), a view."""
        return ops.project_points(key_points, projection_mat, image_wh).permute(0, 3, 1, 2, 4)

    def extra_repr(self) -> str:
        return (
            f"embed_dims={self.embed_dims}, num_groups={self.num_groups}, num_levels={self.num_levels}, "
            f"num_cams={self.num_cams}, num_pts={self.num_pts}, attn_drop={self.attn_drop}, "
            f"use_deformable_func={self.use_deformable_func}, residual_mode={self.residual_mode!r}"
        )
