"""The work that is timed of an op: its forward, the kernels of its backward, and both through autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.feature_aggregation import FeatureAggregationInputs
from reimplementation.bench.inputs import AggregationInputs, AttentionInputs, DiscreteAttentionInputs, OpInputs
from reimplementation.ops.backends.triton import NAMESPACE as TRITON_NAMESPACE
from reimplementation.ops.backends.triton import OPS as TRITON_OPS

OP_PASSES = ("forward", "forward warm", "backward", "backward frozen", "backward deterministic", "training")

ATTN_DROP = 0.15  # SparseDrive's, where the inputs of a case leave pairs out

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Op:
    """An op that the benchmark knows.

    function: takes the operands in their order.
    name: of the operator of its kernels in a backend's namespace of ``torch.ops``; that of their backward is
        ``NAME_backward``.
    leaves: the places of the operands that the backward has gradients of.
    settings: what the operators take behind the operands.
    keeps: whether the operator returns something for its backward beside its output.
    composed: whether the function does more than call that operator.
    """

    function: Function
    name: str
    leaves: tuple[int, ...] = (0, 3, 4)
    settings: tuple = ()
    keeps: bool = False
    composed: bool = False

    def has_kernels(self, backend: str) -> bool:
        """Whether a backend has kernels of all of it; where not, PyTorch runs too, and the backward is autograd's."""
        if self.composed:
            return False
        return backend in ("cuda", "cpu") or (backend == "triton" and self.name in TRITON_OPS)

    def backward_step(self, inputs: OpInputs, backend: str, passed: str) -> Callable[[], object]:
        """The kernels of the backward alone."""
        operators = getattr(torch.ops, TRITON_NAMESPACE if backend == "triton" else "reimplementation")
        with torch.no_grad():
            returned = getattr(operators, self.name)(*inputs, *self.settings)
        output, *kept = returned if self.keeps else (returned,)
        backward, grad_output = getattr(operators, f"{self.name}_backward"), torch.randn_like(output)
        needs = passed != "backward frozen", *[True] * (len(self.leaves) - 1)
        deterministic = passed == "backward deterministic"
        return lambda: backward(grad_output, *inputs, *kept, *self.settings, *needs, deterministic)


OPS: dict[type[OpInputs], Op] = {
    AggregationInputs: Op(ops.deformable_aggregation_function, "deformable_aggregation"),
    FeatureAggregationInputs: Op(
        partial(ops.deformable_feature_aggregation, attn_drop=ATTN_DROP),
        "deformable_feature_aggregation",
        leaves=(0, 3, 6, 7),
        settings=(ATTN_DROP, False),
        keeps=True,
    ),
    AttentionInputs: Op(ops.ms_deform_attn, "ms_deform_attn"),
    DiscreteAttentionInputs: Op(
        partial(ops.ms_deform_attn, method="discrete"), "ms_deform_attn", leaves=(0, 4), composed=True
    ),
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
        shapes, starts = (field.name for field in fields(inputs)[1:3])
        inputs = replace(inputs, **{name: getattr(inputs, name).cpu() for name in (shapes, starts)})
    return (
        op.backward_step(inputs, backend, passed)
        if passed.startswith("backward")
        else autograd_step(op.function, inputs, passed)
    )


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
    places = op_of(inputs).leaves
    operands = [t.detach().requires_grad_(records) if i in places else t for i, t in enumerate(inputs)]
    return lambda: function(*operands), [operands[i] for i in places]
