"""Ops of elementwise arithmetic: one kernel where nobody else would fuse it, its formula everywhere else.

Call by call the host spends more time on launching such a formula than a GPU on running it. A compiler fuses it with
what surrounds it, though, and an export should hold standard operators alone: whatever traces a call sees the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import is_traced, select_backend
from .calls import REFUSALS, explain
from .checks import check_device, check_dtype
from .operands import as_dtype
from .registration import Kernel

KERNEL_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class PointwiseOp:
    """An op whose first operand sets the device and, at least float32, the dtype; another may be None."""

    title: str
    check: Callable[..., None]  # raises where an operand is not what the op takes
    formula: Callable[..., Tensor]  # plain PyTorch, of operands that were checked
    kernel: Kernel | None  # of the extension


def run(op: PointwiseOp, *operands: Tensor | None) -> Tensor:
    """Run the op's kernel or its formula.

    As in `calls.run` the kernel's own checks come first, and `PointwiseOp.check` says why they refused.
    """
    if not is_traced():
        try:
            if _is_for_kernel(op, operands):
                return op.kernel.eager(*_as_kernels_read(op, operands))
        except REFUSALS as error:
            explain(error, op.check, operands)
            raise
    op.check(*operands)
    return op.formula(*operands)


def check_as_kernels_read(names: tuple[str, ...], operands: tuple[Tensor | None, ...]) -> None:
    """Raise TypeError or ValueError unless the operands have the first one's device and dtype, one of the kernels'."""
    first, *others = operands
    check_dtype(names[0], first, KERNEL_DTYPES)
    for name, operand in zip(names[1:], others):
        if operand is not None:
            check_dtype(name, operand, (first.dtype,))
            check_device(name, operand, first.device)


def check_gradient(grad_output: Tensor, output: Tensor) -> None:
    """Raise TypeError or ValueError unless ``grad_output`` can be the gradient of an output like this one."""
    check_dtype("grad_output", grad_output, (output.dtype,))
    if grad_output.shape != output.shape:
        raise ValueError(f"grad_output must be {tuple(output.shape)}; got {tuple(grad_output.shape)}")
    check_device("grad_output", grad_output, output.device)


def _is_for_kernel(op: PointwiseOp, operands: tuple[Tensor | None, ...]) -> bool:
    """Whether there is a kernel, and it has all the gradients that are wanted."""
    if select_backend(operands[0].device, op.title) == "grid_sample":
        return False
    if not torch.is_grad_enabled():
        return True
    constants = [operand for i, operand in enumerate(operands) if i not in op.kernel.differentiable]
    return not torch._C._any_requires_grad(*constants)


def _as_kernels_read(op: PointwiseOp, operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    dtype = operands[0].dtype
    if dtype in KERNEL_DTYPES and all([operand is None or operand.dtype == dtype for operand in operands]):
        return operands
    op.check(*operands)
    dtype = torch.promote_types(dtype, torch.float32)
    return tuple(operand if operand is None else as_dtype(operand, dtype) for operand in operands)
