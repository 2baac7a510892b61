"""What one node of the graph computes `DeformableFeatureAggregation` from, where all its parts are plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reimplementation.models.plain import are_plain, calls_are_unseen, is_plain, weight_and_bias
from reimplementation.ops.backends import select_backend
from reimplementation.ops.dtypes import as_dtype

from .arguments import Arguments
from .key_points import Sparse4DBox3DKeyPointsGenerator, SparseBox3DKeyPointsGenerator, check_key_points
from .one_node import Settings, Tensors

if TYPE_CHECKING:
    from .aggregation import DeformableFeatureAggregation

_OF_BOXES = (SparseBox3DKeyPointsGenerator, Sparse4DBox3DKeyPointsGenerator)
_ENCODER = [nn.Linear, nn.ReLU, nn.LayerNorm, nn.Linear, nn.ReLU, nn.LayerNorm]
_NO_ENCODER = [None] * 8  # parameters
_MOST_CHANNELS = 3072  # that the encoder's kernels take in every dtype, see `ops.linear_relu_norm`


def settings_of(module: DeformableFeatureAggregation) -> Settings:
    encoder: Any = module._modules.get("camera_encoder")
    norms = [] if encoder is None else [layer for layer in encoder._modules.values() if type(layer) is nn.LayerNorm]
    return Settings([norm.eps for norm in norms], module.attn_drop, module.residual_mode or "none")


def plain_tensors(module: DeformableFeatureAggregation, arguments: Arguments, keep: Tensor | None) -> Tensors | None:
    """What `one_node.aggregate` takes; None where somebody could tell that the layers are not called.

    That is so where a layer is no plain one, under a tracer, a transform or a backend without kernels, where the
    cameras need a gradient, and where dtypes differ, but for features in half precision.
    """
    instance_feature, anchor, anchor_embed, feature_maps, projection_mat, image_wh = arguments
    device = instance_feature.device
    if not (module.use_deformable_func and calls_are_unseen() and select_backend(device) == device.type):
        return None
    layers, features = _parameters(module), feature_maps[0]
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    cameras = as_dtype(projection_mat, wide), image_wh if image_wh is None else as_dtype(image_wh, wide)
    if layers is None or not are_plain((instance_feature, anchor, anchor_embed, *cameras, *layers), wide):
        return None
    if not are_plain((features,), features.dtype) or (torch.is_grad_enabled() and _need_gradient(cameras)):
        return None
    places, *of_places = _places(module, instance_feature, anchor, wide)
    inputs = instance_feature, places, anchor_embed, *feature_maps, *cameras, keep
    return Tensors.of((*inputs, *of_places, *layers))


def _need_gradient(cameras: tuple[Tensor, Tensor | None]) -> bool:
    return any([tensor is not None and tensor.requires_grad for tensor in cameras])


def _parameters(module: DeformableFeatureAggregation) -> list[Tensor | None] | None:
    """Of the layers behind the key points, those of the encoder last; None where one is not what it was built as."""
    parts: dict[str, Any] = module._modules  # as a module's attributes they take ten times as long to find
    dropout, encoder = parts["proj_drop"], parts.get("camera_encoder")
    if not is_plain(dropout, nn.Dropout) or (dropout.training and dropout.p > 0):
        return None
    layers: list[tuple[Any, type[nn.Module]]] = [(parts["weights_fc"], nn.Linear), (parts["output_proj"], nn.Linear)]
    if encoder is not None:
        is_known = is_plain(encoder, nn.Sequential) and len(encoder) == len(_ENCODER)
        if not is_known or module.embed_dims > _MOST_CHANNELS:
            return None
        layers += zip(encoder._modules.values(), _ENCODER)
    if not all([is_plain(layer, kind) for layer, kind in layers]):
        return None
    found = [tensor for layer, kind in layers if kind is not nn.ReLU for tensor in weight_and_bias(layer)]
    if any([tensor is None for tensor in found]):
        return None
    return found if encoder is not None else [*found, *_NO_ENCODER]


def _places(
    module: DeformableFeatureAggregation, instance_feature: Tensor, anchor: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Anchors of boxes, their fixed places, and the layer of the learned ones; or key points, and None three times."""
    generator: Any = module._modules["kps_generator"]
    if any([is_plain(generator, kind) for kind in _OF_BOXES]):
        fixed, layer = generator._parameters["fix_scale"], generator._modules.get("learnable_fc")
        learned = (None, None) if layer is None else weight_and_bias(layer)
        has_plain_layer = layer is None or (is_plain(layer, nn.Linear) and learned[1] is not None)
        if has_plain_layer and not fixed.requires_grad and are_plain((fixed, *learned), dtype):
            return anchor, fixed, *learned
    key_points = generator(anchor, instance_feature)
    check_key_points(key_points, instance_feature, module.num_pts)
    return as_dtype(key_points, dtype), None, None, None
