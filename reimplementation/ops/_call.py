"""From the Python function of an op to its operator, or to its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import Op, raise_if_out_of_memory
from ._spec import Operands, dtypes_of
from .backends import select_backend

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a kernel, or the way to it, raises for operands that an op does not take."""


def call(op: Op, *operands: Any, settings: tuple = ()) -> Tensor:
    """Run the op on the best backend for the first operand's device.

    The kernels refuse what `Spec.check` refuses. It runs where they did, and says why in better words: beforehand it
    would cost more of the host's time than launching a small op. Beforehand it runs where the formula does, which
    refuses little, and where a call is traced, as a compiler would hide the error of a fake kernel in its own.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return _call_traced(op, operands, settings)
    try:
        if torch._C._is_any_autocast_enabled():
            operands = _under_autocast(op, operands)
        kernels = op.kernels.get(select_backend(operands[0].device, op.spec.title))
        if kernels is None or (op.spec.constants and _wants_formula(op, operands)):
            return op.formula(*_checked(op, operands, settings), *settings)
        if dtypes_of(operands) not in op.read_as_they_are:
            operands = _checked(op, operands, settings)
        arguments = operands + settings if settings else operands
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
            return kernels.recorded.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            returned = kernels.operator(*arguments)
        return returned if op.spec.kept is None else returned[0]
    except _REFUSALS as error:
        _explain(error, op, operands, settings)
        raise


def _call_traced(op: Op, operands: tuple, settings: tuple) -> Tensor:
    """The same where a compiler or an exporter records the call. ONNX knows no operator of ours."""
    if torch._C._is_any_autocast_enabled():
        operands = _under_autocast(op, operands)
    op.spec.check_call(operands, settings)
    operands = op.spec.as_read(operands)
    kernels = None
    if not (op.spec.is_pointwise or torch.onnx.is_in_onnx_export()):
        kernels = op.kernels.get(select_backend(operands[0].device, op.spec.title, in_graph=True))
    if kernels is None or any([operands[i] is not None and operands[i].requires_grad for i in op.spec.constants]):
        return op.formula(*operands, *settings)
    return op.spec.output_of(kernels.operator(*operands, *settings))


def _under_autocast(op: Op, operands: tuple) -> tuple:
    """The operands as the op takes them under autocast; what is no tensor, or on meta, is left to the checks."""
    first = operands[0]
    if not isinstance(first, Tensor) or first.device.type == "meta" or not op.spec.changes_under_autocast:
        return operands
    return op.spec.under_autocast(operands) if torch.is_autocast_enabled(first.device.type) else operands


def _wants_formula(op: Op, operands: Operands) -> bool:
    """Whether a gradient is wanted that the kernels have not, and the formula has."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*[operands[i] for i in op.spec.constants])


def _checked(op: Op, operands: tuple, settings: tuple) -> tuple:
    """The operands as kernels and formulas read them, after they have passed the checks."""
    op.spec.check_call(operands, settings)
    dtypes = dtypes_of(operands)
    if op.spec.is_read(dtypes):
        op.read_as_they_are.add(dtypes)
        return operands
    return op.spec.as_read(operands)


def _explain(error: Exception, op: Op, operands: Operands, settings: tuple) -> None:
    """Raise what says in better words why there was this error; return where nothing does."""
    try:
        op.spec.check_call(operands, settings)
    except (ValueError, TypeError) as better:
        raise better from None
    raise_if_out_of_memory(error, operands[0].device)
