"""Register an op of the extension with PyTorch: tracing (fake kernels), autograd, autocast.

Every op has a forward ``name(features, shapes, starts, locations, weights)`` and a backward
``name_backward(grad_output, the same five, needs_features, needs_locations, needs_weights)`` that returns three
gradients; one that is not needed has no elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operands import under_autocast

DIFFERENTIABLE = (0, 3, 4)  # features, locations, weights among the operands


def register(name: str, fake: Callable[..., Tensor]) -> None:
    """Give the op ``reimplementation::name`` and its backward what PyTorch needs.

    Args:
        name: the op's name.
        fake: from the five operands, an empty tensor like the op's output.
    """
    forward = getattr(torch.ops.reimplementation, name)
    backward = getattr(torch.ops.reimplementation, f"{name}_backward")

    def autocast_kernel(device_type: str) -> Callable[..., Tensor]:
        def kernel(features, shapes, starts, locations, weights):
            locations, weights = under_autocast(features, locations, weights)
            with torch.autocast(device_type, enabled=False):
                return forward(features, shapes, starts, locations, weights)

        return kernel

    def differentiate(ctx, grad_output: Tensor):
        needs = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
        grads = backward(grad_output, *ctx.saved_tensors, *needs)
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


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _fake_backward(grad_output, features, shapes, starts, locations, weights, *needs: bool):
    grads = features.new_empty(features.shape), torch.empty_like(locations), torch.empty_like(weights)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, needs))
