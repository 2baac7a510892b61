"""Register an op of the extension with PyTorch: tracing (fake kernels), autograd, autocast.

Every op ``name(*operands)`` has a backward ``name_backward(grad_output, *operands, *flags)`` that returns the gradients
of those operands that can have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import under_autocast


@dataclass(frozen=True)
class Kernel:
    """An op of the extension as Python code should call it.

    ``traced`` is ``torch.ops.reimplementation.NAME``. Where nothing traces the call, ``eager`` goes past the
    dispatcher's Python wrappers of registered formulas, which take longer than the rest of a small call.
    ``differentiable`` are the places of the operands that the kernel has gradients of.
    """

    traced: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    differentiable: tuple[int, ...]


def register(
    name: str,
    fake: Callable[..., Tensor],
    fake_backward: Callable[..., Tensor | tuple[Tensor, ...]],
    differentiable: tuple[int, ...],
    flags: Callable[[Sequence[bool]], Sequence[bool]] = lambda needs: (),
    formula: Callable[..., Tensor] | None = None,
    autocast: Callable[..., Sequence[Tensor]] | None = None,
) -> Kernel:
    """Give the op ``reimplementation::name`` and its backward what PyTorch needs.

    Args:
        name: the op's name.
        fake: from the operands, an empty tensor like the op's output. It checks the operands too: no kernel sees them.
        fake_backward: the same for the backward and its gradients.
        differentiable: the places of the operands that the backward has gradients of, in their order.
        flags: which of these gradients are needed, to what the backward takes behind the operands.
        formula: the op in plain PyTorch. Second derivatives are its, and the gradients of the other operands. Without
            it there are none of the former, and an error says so.
        autocast: from the operands, those that the op takes under autocast; without it autocast changes nothing.
    """
    forward = getattr(torch.ops.reimplementation, name).default
    backward = getattr(torch.ops.reimplementation, f"{name}_backward").default

    def autocast_kernel(device_type: str) -> Callable[..., Tensor]:
        def kernel(*operands):
            operands = autocast(*operands)
            with torch.autocast(device_type, enabled=False):
                return forward(*operands)

        return kernel

    def differentiate(ctx, grad_output: Tensor):
        needs = [ctx.needs_input_grad[i] for i in differentiable]
        if formula is not None and (torch.is_grad_enabled() or sum(needs) < sum(ctx.needs_input_grad)):
            return _differentiate_formula(formula, ctx, grad_output)
        grads = backward(grad_output, *ctx.saved_tensors, *flags(needs))
        by_operand = [None] * len(ctx.needs_input_grad)
        for i, needed, grad in zip(differentiable, needs, (grads,) if isinstance(grads, Tensor) else grads):
            by_operand[i] = grad if needed else None
        return tuple(by_operand)

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")

    if autocast is not None:
        torch.library.impl(f"reimplementation::{name}", "AutocastCUDA", autocast_kernel("cuda"))
        torch.library.impl(f"reimplementation::{name}", "AutocastCPU", autocast_kernel("cpu"))
    torch.library.register_fake(f"reimplementation::{name}", fake)
    torch.library.register_fake(f"reimplementation::{name}_backward", fake_backward)
    torch.library.register_autograd(f"reimplementation::{name}", differentiate, setup_context=_save)
    torch.library.register_autograd(f"reimplementation::{name}_backward", no_second_derivative)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands: Tensor | None) -> Tensor:
            ctx.save_for_backward(*operands)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*operands)

        @staticmethod
        def backward(ctx, grad_output: Tensor):
            if torch.is_grad_enabled():  # create_graph=True: a second derivative must find its formula, or its error
                return differentiate(ctx, grad_output)
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    return differentiate(ctx, grad_output)
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                raise

    Eager.__name__ = name

    def eager(*operands: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
            return Eager.apply(*operands)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*operands)

    return Kernel(forward, eager, differentiable)


def register_sampling(name: str, fake: Callable[..., Tensor]) -> Kernel:
    """`register` an op of features, shapes, starts, locations and weights.

    Its backward is told which of the three gradients are needed, and whether they must be deterministic. One that is
    not needed has no elements.
    """
    return register(
        name,
        fake,
        _fake_sampling_backward,
        differentiable=(0, 3, 4),  # features, locations, weights
        flags=lambda needs: (*needs, _must_be_deterministic()),
        autocast=lambda features, shapes, starts, *others: (
            features,
            shapes,
            starts,
            *under_autocast(features, *others),
        ),
    )


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise PyTorch's type of error where a kernel found a GPU full: that is what callers handle."""
    if str(error).startswith("CUDA out of memory"):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # a launch that failed before makes allocations fail too: this raises its error
        raise torch.OutOfMemoryError(str(error)) from error


def _must_be_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_formula(formula: Callable[..., Tensor], ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of an op by its formula; themselves differentiable where the backward shall be."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where one operand was computed from another, what reaches the latter through it is not asked for here.
        operands = [operand if operand is None else operand.view_as(operand) for operand in ctx.saved_tensors]
        output = formula(*operands)
    wanted = [operand for operand, needed in zip(operands, ctx.needs_input_grad) if needed]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)


def _fake_sampling_backward(grad_output, features, shapes, starts, locations, weights, *flags: bool):
    grads = features.new_empty(features.shape), torch.empty_like(locations), torch.empty_like(weights)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, flags))
