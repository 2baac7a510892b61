"""An op, registered with PyTorch: fake kernels, autograd and autocast follow from its spec.

Every operator ``name(*operands, *settings)`` has a backward, ``name_backward(grad_output, *operands, *settings,
*flags)``, that returns the gradients of those operands that can have one. What the operator returned beside its output
follows the operands there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._spec import Dtype, Spec
from .backends import EXTENSION_AVAILABLE, triton

Flags = Callable[[Sequence[bool], Dtype], Sequence[bool]]


@dataclass(frozen=True, eq=False)
class Kernels:
    """A backend's kernels of an op.

    operator: ``torch.ops.reimplementation.NAME``, or that of another namespace.
    recorded: its autograd function for calls that nobody traces. It goes past the wrappers in Python that the
        dispatcher has around registered formulas, which take longer than the rest of a small call.
    """

    operator: Any
    recorded: Any


@dataclass(frozen=True, eq=False)
class Op:
    """An op as `_call.call` runs it.

    formula: the op in plain PyTorch, of operands as `Spec.as_read` returns them, and the settings.
    kernels: by backend. A backend without kernels of this op runs its formula.
    read_as_they_are: the operands' dtypes of earlier calls that needed no cast.
    """

    spec: Spec
    formula: Callable[..., Tensor]
    kernels: dict[str, Kernels] = field(default_factory=dict)
    read_as_they_are: set[tuple] = field(default_factory=set)


def define(spec: Spec, formula: Callable[..., Tensor], flags: Flags = lambda needs, dtype: ()) -> Op:
    """The op of a spec, with the extension's kernels where it is there, and Triton's as soon as that is asked for.

    Args:
        spec: what it takes and gives.
        formula: the op in plain PyTorch.
        flags: from which of the `Spec.differentiable` operands need a gradient, and the dtype of the first operand, to
            what the operator's backward takes last. Where it takes any, the first ones are those needs.
    """
    if EXTENSION_AVAILABLE and not hasattr(torch.ops.reimplementation, spec.name):
        raise ImportError(
            f"the compiled library of reimplementation has no {spec.name}: it was built from older sources than the "
            "package's; build it again, by `pip install .` or `python setup.py build_ext --inplace` in the source "
            "folder"
        )
    op = Op(spec, formula)
    if EXTENSION_AVAILABLE:
        native = _kernels(spec, formula, flags, "reimplementation")
        op.kernels.update(cuda=native, cpu=native)

    def define_for_triton(forward: Callable, backward: Callable) -> None:
        _define_for_triton(spec, forward, backward)
        op.kernels[triton.TRITON.name] = _kernels(spec, formula, flags, triton.NAMESPACE)

    triton.when_loaded(spec.name, define_for_triton)
    return op


def raise_if_out_of_memory(error: Exception, device: torch.device) -> None:
    """Raise PyTorch's type of error where a kernel found the GPU full: that is what callers handle."""
    if str(error).startswith("CUDA out of memory"):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(
                device
            )  # a launch that failed before makes allocations fail too: this raises its error
        raise torch.OutOfMemoryError(str(error)) from error


def _kernels(spec: Spec, formula: Callable[..., Tensor], flags: Flags, namespace: str) -> Kernels:
    """The operators of a namespace, with fake kernels, autograd and autocast."""
    operator = getattr(getattr(torch.ops, namespace), spec.name).default
    differentiate = _differentiation(spec, formula, flags, namespace)
    _register_fakes(spec, operator.name())
    _register_derivatives(spec, operator, differentiate)
    _register_autocast(spec, operator)
    return Kernels(operator, _recorded(spec, operator, differentiate))


def _differentiation(spec: Spec, formula: Callable[..., Tensor], flags: Flags, namespace: str) -> Callable:
    """The backward of the operator, as a function of autograd's context and the output's gradient."""
    backward = getattr(getattr(torch.ops, namespace), f"{spec.name}_backward").default

    def differentiate(ctx, grad_output: Tensor, *of_what_is_kept: None) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[i] for i in spec.differentiable]
        if sum(needs) < sum(ctx.needs_input_grad) or (spec.is_pointwise and torch.is_grad_enabled()):
            return _differentiate_formula(spec, formula, ctx, grad_output)
        saved = ctx.saved_tensors
        grads = backward(grad_output, *saved, *ctx.settings, *flags(needs, saved[0].dtype))
        by_operand: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, needed, grad in zip(spec.differentiable, needs, (grads,) if isinstance(grads, Tensor) else grads):
            by_operand[i] = grad if needed else None
        return tuple(by_operand)

    return differentiate


def _register_fakes(spec: Spec, name: str) -> None:
    """Fake kernels of the operator of that name, and of its backward."""
    num_operands, num_gradients = len(spec.operands), len(spec.differentiable)

    def fake(*arguments):
        return spec.fake(arguments[:num_operands])

    def fake_backward(grad_output, *rest):
        operands, flags = rest[:num_operands], rest[num_operands + (spec.kept is not None) + len(spec.settings) :]
        grads = spec.fake_gradients(grad_output, operands, flags[:num_gradients] or [True] * num_gradients)
        return grads if len(grads) > 1 else grads[0]

    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", fake_backward)


def _define_for_triton(spec: Spec, forward: Callable, backward: Callable) -> None:
    """The operators of Triton's launchers, which leave all checks to the spec."""
    from .backends.triton import operators  # not before Triton is imported

    num_operands = len(spec.operands)

    def check(*arguments, values: bool) -> None:
        spec.check_as_read(arguments[:num_operands])
        if values:
            spec.check_values(*arguments)

    def check_backward(grad_output, *rest, values: bool) -> None:
        spec.check_gradient(grad_output, rest[:num_operands])

    operators.define(spec.name, forward, check)
    operators.define(f"{spec.name}_backward", backward, check_backward)


def _register_derivatives(spec: Spec, operator: Any, differentiate: Callable) -> None:
    """Autograd of the operator; its backward has no derivative."""

    def save(ctx, inputs, output):
        _save(spec, ctx, inputs, output)

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(f"{spec.name} has no second derivative: call backward without create_graph=True")

    torch.library.register_autograd(operator.name(), differentiate, setup_context=save)
    torch.library.register_autograd(f"{operator.name()}_backward", no_second_derivative)


def _register_autocast(spec: Spec, operator: Any) -> None:
    num_operands = len(spec.operands)

    def autocast(device_type: str) -> Callable[..., Tensor]:
        def kernel(*arguments):
            operands = spec.under_autocast(arguments[:num_operands])
            with torch.autocast(device_type, enabled=False):
                return operator(*operands, *arguments[num_operands:])

        return kernel

    if spec.changes_under_autocast:
        torch.library.impl(operator.name(), "AutocastCUDA", autocast("cuda"))
        torch.library.impl(operator.name(), "AutocastCPU", autocast("cpu"))


def _recorded(spec: Spec, operator: Callable[..., Tensor], differentiate: Callable) -> type[torch.autograd.Function]:
    """The operator's autograd function for calls that nobody traces."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                returned = operator(*arguments)
            _save(spec, ctx, arguments, returned)
            return returned if spec.kept is None else returned[0]

        @staticmethod
        def backward(ctx, grad_output: Tensor):
            if torch.is_grad_enabled():  # create_graph=True: a second derivative must find its formula, or its error
                return differentiate(ctx, grad_output)
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    return differentiate(ctx, grad_output)
            except RuntimeError as error:
                raise_if_out_of_memory(error, grad_output.device)
                raise

    Recorded.__name__ = spec.name
    return Recorded


def _save(spec: Spec, ctx, arguments: Sequence, returned: Any) -> None:
    """Keep what the backward reads: the operands, what the operator returned for it, and the settings."""
    if spec.settings:
        num_operands = len(spec.operands)
        arguments, ctx.settings = arguments[:num_operands], arguments[num_operands:]
    else:
        ctx.settings = ()
    if spec.kept is None:
        ctx.save_for_backward(*arguments)
    else:
        ctx.save_for_backward(*arguments, returned[1])
        ctx.mark_non_differentiable(returned[1])


def _differentiate_formula(
    spec: Spec, formula: Callable[..., Tensor], ctx, grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of an op by its formula; themselves differentiable where the backward shall be."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where one operand was computed from another, what reaches the latter through it is not asked for here.
        saved = ctx.saved_tensors[: len(spec.operands)]
        operands = [operand if operand is None else operand.view_as(operand) for operand in saved]
        output = formula(*operands, *ctx.settings)
    wanted: list[Any] = [operand for operand, needed in zip(operands, ctx.needs_input_grad) if needed]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
