"""A linear layer, ReLU and a layer norm: the block that anchor and camera encoders are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ._call import call
from ._register import define
from ._spec import REAL, Operand, Spec
from .autocast import without_autocast

__all__ = ["linear_relu_norm"]


def linear_relu_norm(
    feature: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """``layer_norm(relu(feature @ weight.T + bias))``, one block of SparseDrive's and Sparse4D's ``linear_relu_ln``.

    Called layer by layer it is three kernels or four, and for the few hundred rows of an encoder each of them takes
    less than its launch. Here it is one; nothing is kept for the backward but the operands.

    Args:
        feature: (bs, num_queries, in_features), any floating dtype.
        weight: (out_features, in_features) of the linear layer, any floating dtype, and so are the others.
        bias: (out_features,) of the linear layer.
        norm_weight: (out_features,) of the norm (layer normalisation, arXiv 1607.06450).
        norm_bias: (out_features,) of the norm.
        eps: is added to the variance, at least 0.

    Returns:
        (bs, num_queries, out_features), in the dtype of ``feature`` but at least float32; autocast changes nothing.

    Gradients of any order flow to all tensors. The formula runs, plain PyTorch, where PyTorch traces the call.

    Raises:
        ValueError: a shape or device does not fit, or eps is negative.
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, memory ran out (on a GPU that is a torch.OutOfMemoryError), or
            a row and two outputs do not fit the memory that a block of a GPU's threads shares, about 48 KB.
    """
    return call(_OP, feature, weight, bias, norm_weight, norm_bias, settings=(float(eps),))


def _formula(feature: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float):
    with without_autocast(feature.device):
        return F.layer_norm(F.linear(feature, weight, bias).relu(), bias.shape, norm_weight, norm_bias, eps)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if sizes["out_features"] == 0:
        raise ValueError("weight must be (out_features, in_features) with out_features at least 1; got 0")


def _check_values(*arguments) -> None:
    eps = arguments[-1]
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")


def _of_outputs(name: str) -> Operand:
    return Operand(name, ("out_features",), REAL, torch.contiguous_format)


SPEC = Spec(
    name="linear_relu_norm",
    title="Linear layer, ReLU and norm",
    operands=(
        Operand("feature", ("bs", "num_queries", "in_features"), REAL, torch.contiguous_format),
        Operand("weight", ("out_features", "in_features"), REAL, torch.contiguous_format),
        _of_outputs("bias"),
        _of_outputs("norm_weight"),
        _of_outputs("norm_bias"),
    ),
    output=lambda sizes: (sizes["bs"], sizes["num_queries"], sizes["out_features"]),
    settings=("eps",),
    check_sizes=_check_sizes,
    check_values=_check_values,
    is_pointwise=True,
)
_OP = define(SPEC, _formula)
