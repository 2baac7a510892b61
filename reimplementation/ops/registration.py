"""Register an op of the extension with PyTorch: tracing (fake kernels), autograd, autocast.

Every op has a forward ``name(features, shapes, starts, locations, weights)`` and a backward
``name_backward(grad_output, the same five, needs_features, needs_locations, needs_weights, deterministic)`` that
returns three gradients; one that is not needed has no elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import under_autocast

DIFFERENTIABLE = (0, 3, 4)  # features, locations, weights among the operands


@dataclass(frozen=True)
class Kernel:
    """An op of the extension as Python code should call it.

    ``traced`` is ``torch.ops.reimplementation.NAME``. Where nothing traces the call, ``eager`` goes past the
    dispatcher's Python wrappers of registered formulas, which take longer than the rest of a small call.
    """

    traced: Callable[..., Tensor]
    eager: Callable[..., Tensor]


def register(name: str, fake: Callable[..., Tensor]) -> Kernel:
    """Give the op ``reimplementation::name`` and its backward what PyTorch needs.

    Args:
        name: the op's name.
        fake: from the five operands, an empty tensor like the op's output.

        It checks the operands too: no kernel sees them.
    """
    forward = getattr(torch.ops.reimplementation, name).default
    backward = getattr(torch.ops.reimplementation, f"{name}_backward").default

    def autocast_kernel(device_type: str) -> Callable[..., Tensor]:
        def kernel(features, shapes, starts, locations, weights):
            locations, weights = under_autocast(features, locations, weights)
            with torch.autocast(device_type, enabled=False):
                return forward(features, shapes, starts, locations, weights)

        return kernel

    def differentiate(ctx, grad_output: Tensor):
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        grads = backward(grad_output, *ctx.saved_tensors, *needs, _must_be_deterministic())
        grad_features, grad_locations, grad_weights = (grad if needed else None for grad, needed in zip(grads, needs))
        return grad_features, None, None, grad_locations, grad_weights

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")

    torch.library.impl(f"reimplementation::{name}", "AutocastCUDA", autocast_kernel("cuda"))
    torch.library.impl(f"reimplementation::{name}", "AutocastCPU", autocast_kernel("cpu"))
    torch.library.register_fake(f"reimplementation::{name}", fake)
    torch.library.register_fake(f"reimplementation::{name}_backward", _fake_backward)
    torch.library.register_autograd(f"reimplementation::{name}", differentiate, setup_context=_save)
    torch.library.register_autograd(f"reimplementation::{name}_backward", no_second_derivative)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands: Tensor) -> Tensor:
            ctx.save_for_backward(*operands)
            with torch._C._AutoDispatchBelowAutograd():
                return forward(*operands)

        @staticmethod
        def backward(ctx, grad_output: Tensor):
            if torch.is_grad_enabled():  # create_graph=True: a second derivative must find its error
                return differentiate(ctx, grad_output)
            try:
                with torch._C._AutoDispatchBelowAutograd():
                    return differentiate(ctx, grad_output)
            except RuntimeError as error:
                raise_if_out_of_memory(error)
                raise

    Eager.__name__ = name

    def eager(*operands: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any([operands[i].requires_grad for i in DIFFERENTIABLE]):
            return Eager.apply(*operands)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*operands)

    return Kernel(forward, eager)


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


def _fake_backward(grad_output, features, shapes, starts, locations, weights, *flags: bool):
    grads = features.new_empty(features.shape), torch.empty_like(locations), torch.empty_like(weights)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, flags))
