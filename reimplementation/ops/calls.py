"""From the Python function of a sampling op to its backend; `pointwise` has the way of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .backends import is_traced, select_backend
from .checks import check_levels_fit
from .operands import are_as_kernels_read, as_kernels_read, is_autocast_enabled, under_autocast
from .registration import Kernel, raise_if_out_of_memory

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a kernel, or the way to it, raises for operands that an op does not take."""


@dataclass(frozen=True)
class Op:
    """An op of five operands: features, shapes and first rows of their levels, sampling locations, weights."""

    title: str
    level_names: tuple[str, str, str]  # of shapes, first rows, and the features' rows
    check: Callable[..., None]  # raises where an operand is not what the op takes
    formula: Callable[..., Tensor]  # plain PyTorch
    kernel: Kernel | None  # of the extension


def run(op: Op, features: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Run the op on the best backend for the features' device.

    The kernels refuse what `_check` refuses. It runs where they did, and says why in better words: beforehand it
    would cost more of the host's time than launching a small op. Beforehand it runs where the formula does, which
    refuses little, and where a call is traced, as a compiler would hide the error of a fake kernel in its own.
    """
    if is_autocast_enabled(features):
        locations, weights = under_autocast(features, locations, weights)
    operands = (features, shapes, starts, locations, weights)
    if is_traced():
        _check(op, *operands)
        # ONNX knows no kernel of ours.
        return _run(op, op.formula if torch.onnx.is_in_onnx_export() else op.kernel and op.kernel.traced, *operands)
    try:
        return _run(op, op.kernel and op.kernel.eager, *operands)
    except REFUSALS as error:
        explain(error, partial(_check, op), operands)
        raise


def explain(error: Exception, check: Callable[..., None], operands: Iterable) -> None:
    """Raise what says in better words why there was this error; return where nothing does."""
    try:
        check(*operands)
    except (ValueError, TypeError) as better:
        raise better from None
    raise_if_out_of_memory(error)


def _run(op: Op, kernel: Callable[..., Tensor], features, shapes, starts, locations, weights) -> Tensor:
    if kernel is not op.formula and select_backend(features.device, op.title) == "grid_sample":
        kernel = op.formula
    if kernel is op.formula or not are_as_kernels_read(features, locations, weights):
        _check(op, features, shapes, starts, locations, weights)
        locations, weights = as_kernels_read(features, locations, weights)
    return kernel(features, shapes, starts, locations, weights)


def _check(op: Op, features: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> None:
    op.check(features, shapes, starts, locations, weights)
    check_levels_fit(shapes, starts, features.shape[1], op.level_names)
