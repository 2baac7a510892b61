"""The work that is timed of an op: its forward, the kernels of its backward, and both through autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.inputs import AggregationInputs, AttentionInputs, OpInputs

OP_PASSES = ("forward", "forward warm", "backward", "backward frozen", "backward deterministic", "training")

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Op:
    """An op that the benchmark knows.

    function: takes the five operands in their order.
    backward: the operator of its kernels' backward, a name in ``torch.ops.reimplementation``.
    """

    function: Function
    backward: str


OPS: dict[type[OpInputs], Op] = {
    AggregationInputs: Op(ops.deformable_aggregation_function, "deformable_aggregation_backward"),
    AttentionInputs: Op(ops.ms_deform_attn, "ms_deform_attn_backward"),
}


def op_of(inputs: OpInputs) -> Op:
    """The op whose operands these are; TypeError where the benchmark knows none."""
    if type(inputs) not in OPS:
        known = ", ".join(kind.__name__ for kind in OPS)
        raise TypeError(f"the benchmark has ops for {known}; got {type(inputs).__name__}")
    return OPS[type(inputs)]


def op_step(inputs: OpInputs, backend: str, passed: str) -> Callable[[], object]:
    """The work of one of `OP_PASSES`, on a backend that the caller has chosen."""
    op = op_of(inputs)
    if backend == "grid_sample":  # it reads the shapes on the host
        features, shapes, starts, locations, weights = inputs
        inputs = type(inputs)(features, shapes.cpu(), starts.cpu(), locations, weights)
    if not passed.startswith("backward"):
        return autograd_step(op.function, inputs, passed)
    with torch.no_grad():
        grad_output = torch.randn_like(op.function(*inputs))
    backward = getattr(torch.ops.reimplementation, op.backward)
    needs_features, deterministic = passed != "backward frozen", passed == "backward deterministic"
    return lambda: backward(grad_output, *inputs, needs_features, True, True, deterministic)


def autograd_step(function: Function, inputs: OpInputs, passed: str) -> Callable[[], object]:
    """The forward of a function with an op's operands, or, where ``passed`` is "training", its backward after it."""
    forward, leaves = call(function, inputs, records=passed == "training")
    if passed != "training":
        return forward
    with torch.no_grad():
        grad_output = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad_output)


def call(function: Function, inputs: OpInputs, records: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call of a function on an op's operands, and the tensors whose gradients it records."""
    features, shapes, starts, locations, weights = inputs
    leaves = [t.detach().requires_grad_(records) for t in (features, locations, weights)]
    return lambda: function(leaves[0], shapes, starts, *leaves[1:]), leaves
