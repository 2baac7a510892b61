"""Deformable aggregation in evaluation: what all layers of a head do with the cameras is done for all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation import ops
from reimplementation.models.deformable import DeformableFeatureAggregation, SparsePoint3DKeyPointsGenerator
from reimplementation.ops.dtypes import as_dtype, at_least_float32

from .rows import LinearReLU, constant

CAMERA_LOGITS = "camera_logits"  # the entry of the metas that `InferenceAggregation` looks for


class InferenceAggregation(nn.Module):
    """`DeformableFeatureAggregation` with the cameras' part of the logits given.

    Args:
        module: with a camera encoder, and the residual mode "cat".
        index: which of its head's aggregations it is.
        dtype: of features and products.
    """

    def __init__(self, module: DeformableFeatureAggregation, index: int, dtype: torch.dtype):
        super().__init__()
        self.index = index
        self.use_deformable_func = module.use_deformable_func
        generator = module.kps_generator
        if isinstance(generator, SparsePoint3DKeyPointsGenerator):
            generator = InferenceLinePoints(generator)
        for layer in (generator, module.weights_fc, module.output_proj):
            for linear in layer.modules():
                if isinstance(linear, nn.Linear):
                    linear.to(dtype)
        self.kps_generator = generator
        self.weights_fc = module.weights_fc
        self.output_proj = module.output_proj

    def forward(
        self, feature: Tensor, anchor: Tensor, embed: Tensor, feature_maps: Sequence[Tensor], metas: Mapping
    ) -> Tensor:
        """(bs, n, 2 * embed_dims), as of the module; ``metas["camera_logits"]`` are those of `CameraLogits`."""
        rows, spatial_shape, scale_start_index = feature_maps
        with nullcontext() if self.use_deformable_func else ops.use_backend("grid_sample"):
            features = ops.deformable_feature_aggregation(
                rows,
                spatial_shape,
                scale_start_index,
                self.kps_generator(anchor, feature),
                metas["projection_mat"],
                metas["image_wh"],
                self.weights_fc(feature + embed),
                metas[CAMERA_LOGITS][self.index],
            )
        return torch.cat([self.output_proj(features), feature], dim=-1)


class CameraLogits(nn.Module):
    """What the cameras add to the logits, for every aggregation of a head.

    The encoders of all layers are one product, then products of a batch. The norms' factors and offsets are part of the
    products behind them. All of it is in the modules' own dtype, for projections are not to be rounded.

    Args:
        modules: the aggregations of a head.
        dtype: of the logits.
    """

    def __init__(self, modules: Sequence[DeformableFeatureAggregation], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        encoders = [module.camera_encoder for module in modules]
        first, _, norm, second, _, last_norm = zip(*encoders)
        self.eps = norm[0].eps
        self.embed_dims = modules[0].embed_dims
        self.first = LinearReLU(
            torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first])
        )
        weights, biases = zip(*map(_behind_norm, norm, second))
        self.second_weight, self.second_bias = constant(torch.stack(weights)), constant(torch.stack(biases))
        logits = [module.weights_fc for module in modules]
        weights, biases = zip(*map(_behind_norm, last_norm, logits))
        self.weight = constant(torch.stack(weights))
        offsets = [bias - layer.bias[:, None].mT for bias, layer in zip(biases, logits)]  # the queries' term has it
        self.offset = constant(torch.stack(offsets))

    def forward(self, projection_mat: Tensor) -> Sequence[Tensor]:
        """Logits (bs, num_cams, num_weights) for each aggregation, of matrices (bs, num_cams, 4, 4)."""
        matrices = projection_mat[:, :, :3].flatten(2).flatten(0, 1)
        rows = self.first(as_dtype(matrices, self.first.weight.dtype)).unflatten(-1, (-1, self.embed_dims))
        activated = torch.baddbmm(self.second_bias, self._normalised(rows).transpose(0, 1), self.second_weight).relu_()
        logits = torch.baddbmm(self.offset, self._normalised(activated), self.weight)
        return as_dtype(logits, self.dtype).unflatten(1, projection_mat.shape[:2]).unbind(0)

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.embed_dims,), eps=self.eps)


class InferenceLinePoints(nn.Module):
    """`SparsePoint3DKeyPointsGenerator`, where the linear layer that places points knows their heights too."""

    def __init__(self, generator: SparsePoint3DKeyPointsGenerator):
        super().__init__()
        self.places = (generator.num_sample, len(generator.fix_height) * generator.num_learnable_pts)
        self.ground_height = generator.ground_height
        layer = generator.learnable_fc
        heights = layer.bias.new_tensor(generator.fix_height).repeat_interleave(generator.num_learnable_pts)
        bias = torch.cat([layer.bias.view(*self.places, 2), heights.expand(self.places)[..., None]], dim=-1)
        weight = F.pad(layer.weight.view(-1, 2, layer.in_features), (0, 0, 0, 1)).flatten(0, 1)
        self.learnable_fc = nn.Linear(layer.in_features, len(weight), device="meta")
        self.learnable_fc.weight, self.learnable_fc.bias = constant(weight), constant(bias.flatten())

    def forward(self, anchor: Tensor, feature: Tensor) -> Tensor:
        """(bs, n, num_pts, 3) for anchors (bs, n, num_sample * 2), at least float32."""
        points = at_least_float32(anchor).unflatten(-1, (self.places[0], 1, 2))
        on_ground = F.pad(points, (0, 1), value=self.ground_height)
        around = self.learnable_fc(feature).unflatten(-1, (*self.places, 3))
        return (on_ground + around).flatten(2, 3)


def _behind_norm(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias (1, out) of a linear layer that reads what the norm has not scaled and shifted yet."""
    return (layer.weight * norm.weight).mT, (layer.bias + layer.weight @ norm.bias)[None]
