"""`DeformableFeatureAggregation` as one node of autograd's graph, with the derivatives written down.

At batch 1 the module's time is the host's: each layer is a call of a module, of a function, of autograd and of a
kernel, and each derivative is a node again, with views around its kernels. Here all layers are one operator of the
extension, and their derivatives another (ops/csrc/module), below autograd and autocast. The numbers are those of the
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimplementation.ops.determinism import must_be_deterministic

_ops = torch.ops.reimplementation


class Settings(NamedTuple):
    """What a call depends on beside tensors."""

    epsilons: list[float]  # of the camera encoder's two norms
    attn_drop: float
    residual: str  # none, add or cat


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
    encoder: tuple[Tensor | None, ...]  # weight, bias, norm's weight, norm's bias; and the same of the second layer

    @classmethod
    def of(cls, flat: tuple) -> Tensors:
        """From the tensors in their order, those of the encoder as the last ones."""
        return cls._make((*flat[:_NUM_OTHERS], flat[_NUM_OTHERS:]))

    def flat(self) -> tuple:
        return (*self[:_NUM_OTHERS], *self.encoder)


_NUM_OTHERS = len(Tensors._fields) - 1
_LARGE = 2**20  # numbers: to make more again takes less than the memory is worth, to make fewer the host's time
_DIFFERENTIABLE = (  # and the encoder: in the order of the operator's gradients
    "instance_feature",
    "places",
    "anchor_embed",
    "feature_maps",
    "points_weight",
    "points_bias",
    "weights_weight",
    "weights_bias",
    "output_weight",
    "output_bias",
)


def aggregate(settings: Settings, tensors: Tensors) -> Tensor:
    """The module's output, as a node of the graph where one is recorded."""
    flat = tensors.flat()
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
        return _Node.apply(settings, *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.aggregation_module.default(*flat, *settings, _LARGE)[0]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *flat: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output, *steps = _ops.aggregation_module.default(*flat, *settings, _LARGE)
        ctx.settings = settings
        ctx.save_for_backward(*flat, *steps)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, flags = ctx.saved_tensors, ctx.needs_input_grad[1:]
        flat, steps = saved[: len(flags)], saved[len(flags) :]
        tensors, needs = Tensors.of(flat), Tensors.of(flags)
        with torch._C._AutoDispatchBelowAutograd():
            found = _ops.aggregation_module_backward.default(
                grad_output, *flat, *steps, *ctx.settings, *_wanted(tensors, needs), must_be_deterministic()
            )
        gradients = _in_order(tensors, needs, found)
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


def _wanted(t: Tensors, needs: Tensors) -> tuple[bool, bool, bool]:
    """Which of the gradients that take long are wanted: of the maps, of what places key points, and of the encoder."""
    through_points = needs.points_weight or needs.points_bias
    if t.points_weight is not None:  # whose places follow from the feature
        through_points = through_points or needs.instance_feature
    return bool(needs.feature_maps), bool(needs.places or through_points), any(needs.encoder)


def _in_order(t: Tensors, needs: Tensors, found: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of all that the operator returned, the gradients of the tensors that need one, in their order; else None."""
    by_name = dict(zip(_DIFFERENTIABLE, found))
    if needs.anchor_embed:
        by_name["anchor_embed"] = by_name["anchor_embed"].sum_to_size(t.anchor_embed.shape)
    flat = [by_name.get(name) for name in Tensors._fields[:_NUM_OTHERS]]
    flat += found[len(_DIFFERENTIABLE) :]
    return tuple([gradient if needed else None for gradient, needed in zip(flat, needs.flat())])
