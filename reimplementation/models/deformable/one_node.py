"""`DeformableFeatureAggregation` as one node of autograd's graph, with the derivatives written down.

At batch 1 the module's time is the host's: each layer is a call of a module, of a function, of autograd and of a
kernel, and each derivative is a node again, with views around its kernels. Here the layers' kernels are called one
after the other, below autograd and autocast, and the gradients of what meets in one tensor are added by the products
that make them. The numbers are those of the layers.

What is large, and the backward can make again in one kernel, is not kept: the sum of feature and embedding, and the
logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.determinism import must_be_deterministic
from reimplementation.ops.dtypes import as_dtype

_ops = torch.ops.reimplementation
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


class Settings(NamedTuple):
    """What a call depends on beside tensors. epsilons: of the camera encoder's two norms."""

    residual_mode: str | None
    attn_drop: float
    epsilons: tuple[float, ...]


class Tensors(NamedTuple):
    """The inputs and parameters of a call; of one dtype, but for integers and features, which may be half of it.

    Key points of boxes are placed within the node: ``places`` is then the anchors and ``fix_scale`` is given. Otherwise
    ``places`` is the key points. Layers that a module has not are None.
    """

    instance_feature: Tensor
    places: Tensor
    anchor_embed: Tensor
    feature_maps: Tensor
    spatial_shape: Tensor
    scale_start_index: Tensor
    projection_mat: Tensor
    image_wh: Tensor | None
    keep: Tensor | None
    fix_scale: Tensor | None
    points_weight: Tensor | None
    points_bias: Tensor | None
    weights_weight: Tensor
    weights_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    encoder: tuple[Tensor, ...]  # weight, bias, norm's weight, norm's bias; and the same of the second layer

    @classmethod
    def of(cls, flat: tuple) -> Tensors:
        """From the tensors in their order, those of the encoder as the last ones."""
        return cls._make((*flat[:_NUM_OTHERS], flat[_NUM_OTHERS:]))

    def flat(self) -> tuple:
        return (*self[:_NUM_OTHERS], *self.encoder)


_NUM_OTHERS = len(Tensors._fields) - 1
_LARGE = 2**20  # numbers: to make more again takes less than the memory is worth, to make fewer the host's time


class Layer(NamedTuple):
    """What a layer of the camera encoder leaves for its derivative: its input, and what ReLU and the norm make."""

    rows: Tensor
    activated: Tensor
    mean: Tensor
    scale: Tensor
    output: Tensor


class Steps(NamedTuple):
    """What a call makes on its way to the output; the query and the logits are None where they are large."""

    learned: Tensor | None
    key_points: Tensor
    query: Tensor | None
    logits: Tensor | None
    camera_logits: Tensor | None
    features: Tensor
    statistics: Tensor
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, flat: tuple) -> Steps:
        """From the tensors in their order, those of the layers as the last ones."""
        others, size = len(cls._fields) - 1, len(Layer._fields)
        layers = tuple([Layer(*flat[i : i + size]) for i in range(others, len(flat), size)])
        return cls._make((*flat[:others], layers))

    def flat(self) -> tuple:
        return (*self[:-1], *[tensor for layer in self.layers for tensor in layer])


def aggregate(settings: Settings, tensors: Tensors) -> Tensor:
    """The module's output, as a node of the graph where one is recorded."""
    flat = tensors.flat()
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
        return _Node.apply(settings, *flat)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return _forward(settings, tensors)[0]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *flat: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            output, steps = _forward(settings, Tensors.of(flat))
        ctx.settings = settings
        ctx.save_for_backward(*flat, *steps.flat())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        flat, steps = saved[: len(needs)], Steps.of(saved[len(needs) :])
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            gradients = _backward(ctx.settings, Tensors.of(flat), steps, Tensors.of(needs), grad_output)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _NoSecondDerivative.apply(len(flat), *flat, *gradients)
        return None, *gradients


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on; they depend on the node's inputs, and who differentiates them by these is told."""

    @staticmethod
    def forward(ctx: Any, num_inputs: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[num_inputs:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        raise RuntimeError(
            "DeformableFeatureAggregation has no second derivative: call backward without create_graph=True"
        )


def _forward(settings: Settings, t: Tensors) -> tuple[Tensor, Steps]:
    learned, key_points = _key_points(t)
    query = _query(t)
    logits = _logits(t, query)
    layers = _encoder(settings, t)
    camera_logits = None
    if layers:
        camera_logits = F.linear(layers[-1].output, t.weights_weight).view(*t.projection_mat.shape[:2], logits.shape[2])
    features, statistics = _ops.deformable_feature_aggregation.default(
        *_operands(t, key_points, logits, camera_logits), settings.attn_drop, False
    )
    features = as_dtype(features, query.dtype)
    output = F.linear(features, t.output_weight, t.output_bias)
    if settings.residual_mode == "add":
        output.add_(t.instance_feature)
    elif settings.residual_mode == "cat":
        output = torch.cat([output, t.instance_feature], dim=-1)
    return output, Steps(
        learned, key_points, _unless_large(query), _unless_large(logits), camera_logits, features, statistics, layers
    )


def _unless_large(tensor: Tensor) -> Tensor | None:
    return None if tensor.numel() > _LARGE else tensor


def _key_points(t: Tensors) -> tuple[Tensor | None, Tensor]:
    """The learned places in boxes, as logits, and the key points."""
    if t.fix_scale is None:
        return None, t.places
    learned = None
    if t.points_weight is not None:
        learned = F.linear(t.instance_feature, t.points_weight, t.points_bias)
    return learned, _ops.box_key_points.default(t.places, t.fix_scale, learned)


def _query(t: Tensors) -> Tensor:
    return t.instance_feature + t.anchor_embed


def _logits(t: Tensors, query: Tensor) -> Tensor:
    return F.linear(query, t.weights_weight, t.weights_bias)


def _encoder(settings: Settings, t: Tensors) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for i, epsilon in enumerate(settings.epsilons):
        rows = layers[-1].output if layers else t.projection_mat[:, :, :3].reshape(-1, 12)
        weight, bias, norm_weight, norm_bias = t.encoder[4 * i : 4 * i + 4]
        activated = torch._addmm_activation(bias, rows, weight.t())  # ReLU, in the product's own kernel on a GPU
        output, mean, scale = torch.native_layer_norm(activated, bias.shape, norm_weight, norm_bias, epsilon)
        layers.append(Layer(rows, activated, mean, scale, output))
    return tuple(layers)


def _operands(t: Tensors, key_points: Tensor, logits: Tensor, camera_logits: Tensor | None) -> tuple:
    """The operands of `ops.deformable_feature_aggregation`."""
    levels = t.feature_maps, t.spatial_shape, t.scale_start_index
    return *levels, key_points, t.projection_mat, t.image_wh, logits, camera_logits, t.keep


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _backward(settings: Settings, t: Tensors, steps: Steps, needs: Tensors, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of the tensors that need one, in their order, and None for the others."""
    found: dict[str, Tensor | None] = {}
    of_residual = None
    if settings.residual_mode == "add":
        of_residual = grad_output
    elif settings.residual_mode == "cat":
        grad_output, of_residual = grad_output.chunk(2, dim=-1)
    of_output = _rows(grad_output)
    found["output_weight"], found["output_bias"] = _of_parameters(
        of_output, _rows(steps.features), needs.output_weight, needs.output_bias
    )
    of_features = torch.mm(of_output, t.output_weight).view_as(steps.features)
    query = _query(t) if steps.query is None else steps.query
    of_points, of_logits, of_cameras = _differentiate_op(t, steps, needs, settings, query, of_features, found)
    of_encoder = _differentiate_weights(t, steps, needs, query, of_logits, of_cameras, found)
    _differentiate_inputs(t, steps, needs, of_logits, of_points, of_residual, found)
    by_name = [found.get(name) for name in Tensors._fields[:_NUM_OTHERS]]
    return by_name + _differentiate_encoder(t, steps, needs, of_encoder)


def _of_parameters(
    gradient: Tensor, rows: Tensor, needs_weight: Any, needs_bias: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a linear layer's weight and bias, from that of its output and from its input, as rows."""
    of_weight = torch.mm(gradient.t(), rows) if needs_weight else None
    return of_weight, gradient.sum(0) if needs_bias else None


def _differentiate_op(
    t: Tensors,
    steps: Steps,
    needs: Tensors,
    settings: Settings,
    query: Tensor,
    of_features: Tensor,
    found: dict[str, Tensor | None],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of key points if they need it, and as rows of logits and cameras' logits; of the feature maps, to ``found``."""
    logits = _logits(t, query) if steps.logits is None else steps.logits
    learn = needs.points_weight or needs.points_bias or (steps.learned is not None and needs.instance_feature)
    needs_points = bool(needs.places or learn)
    of_maps, of_points, of_logits, of_cameras = _ops.deformable_feature_aggregation_backward.default(
        as_dtype(of_features, t.feature_maps.dtype),
        *_operands(t, steps.key_points, logits, steps.camera_logits),
        steps.statistics,
        settings.attn_drop,
        False,
        bool(needs.feature_maps),
        needs_points,
        True,
        bool(steps.layers),
        must_be_deterministic(),
    )
    found["feature_maps"] = of_maps if needs.feature_maps else None
    return of_points if needs_points else None, _rows(of_logits), _rows(of_cameras) if steps.layers else None


def _differentiate_weights(
    t: Tensors,
    steps: Steps,
    needs: Tensors,
    query: Tensor,
    of_logits: Tensor,
    of_cameras: Tensor | None,
    found: dict[str, Tensor | None],
) -> Tensor | None:
    """Of the layer that makes the logits, to ``found``; and of the encoder's output, where there is one."""
    of_weight, found["weights_bias"] = _of_parameters(of_logits, _rows(query), needs.weights_weight, needs.weights_bias)
    if of_cameras is None:
        found["weights_weight"] = of_weight
        return None
    if of_weight is not None:
        of_weight = of_weight.addmm_(of_cameras.t(), steps.layers[-1].output)
    found["weights_weight"] = of_weight
    return torch.mm(of_cameras, t.weights_weight) if any(needs.encoder) else None


def _differentiate_inputs(
    t: Tensors,
    steps: Steps,
    needs: Tensors,
    of_logits: Tensor,
    of_points: Tensor | None,
    of_residual: Tensor | None,
    found: dict[str, Tensor | None],
) -> None:
    """Of the instance feature, which is read up to three times, of its embedding, and of what places key points."""
    of_query = torch.mm(of_logits, t.weights_weight)
    if needs.anchor_embed:
        found["anchor_embed"] = of_query.view_as(t.instance_feature).sum_to_size(t.anchor_embed.shape)
    of_feature = of_query if of_residual is None else of_query + _rows(of_residual)
    if t.fix_scale is None or of_points is None:
        found["places"] = of_points
    else:
        gradients = _ops.box_key_points_backward.default(of_points, t.places, t.fix_scale, steps.learned)
        found["places"] = gradients[0]
        if steps.learned is not None:
            of_learned = _rows(gradients[1])
            found["points_weight"], found["points_bias"] = _of_parameters(
                of_learned, _rows(t.instance_feature), needs.points_weight, needs.points_bias
            )
            weight: Any = t.points_weight
            if of_feature is of_query and needs.anchor_embed:  # whose gradient that is
                of_feature = torch.addmm(of_feature, of_learned, weight)
            else:
                of_feature.addmm_(of_learned, weight)
    found["instance_feature"] = of_feature.view_as(t.instance_feature)


def _differentiate_encoder(t: Tensors, steps: Steps, needs: Tensors, gradient: Tensor | None) -> list[Tensor | None]:
    """The gradients of its parameters, from that of its output."""
    found: list[Tensor | None] = [None] * len(t.encoder)
    if gradient is None:
        return found
    for i, layer in reversed(list(enumerate(steps.layers))):
        weight, bias, *affine = t.encoder[4 * i : 4 * i + 4]
        gradient, *found[4 * i + 2 : 4 * i + 4] = torch.ops.aten.native_layer_norm_backward.default(
            gradient, layer.activated, bias.shape, layer.mean, layer.scale, *affine, [True, True, True]
        )
        gradient = torch.ops.aten.threshold_backward.default(gradient, layer.activated, 0)
        found[4 * i], found[4 * i + 1] = _of_parameters(gradient, layer.rows, True, True)
        if i > 0:
            gradient = torch.mm(gradient, weight)
    return found
