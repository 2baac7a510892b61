"""Small networks on rows: a linear layer with its ReLU is one product, and so are two that meet in a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reimplementation.models.sparsedrive.ffn import AsymmetricFFN
from reimplementation.models.sparsedrive.layers import Scale
from reimplementation.ops.dtypes import as_dtype


class LinearReLU(nn.Module):
    """A linear layer and a ReLU in the product's own kernel, on rows (n, in_dims)."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight = constant(weight)
        self.bias = constant(bias)

    def forward(self, rows: Tensor) -> Tensor:
        return torch._addmm_activation(self.bias, rows, self.weight.t())


class Rows(nn.Module):
    """What a sequence of linear layers, ReLUs, layer norms and factors computes in evaluation.

    Args:
        layers: the sequence.
        dtype: of parameters and output.
        first: dtype of the first linear layer and of the norm behind it, None: ``dtype``. Coordinates are not to be
            rounded, nor what they make before it is normalised, for it may differ little from channel to channel.
    """

    def __init__(self, layers: nn.Module, dtype: torch.dtype, first: torch.dtype | None = None):
        super().__init__()
        self.layers = nn.ModuleList(module.to(dtype) for module in _fused(list(layers.children())))
        self.layers[:2].to(first or dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims) of x (..., in_dims)."""
        rows = x.flatten(0, -2)
        layer: Any
        for layer in self.layers:
            rows = layer(as_dtype(rows, layer.weight.dtype))
        return rows.unflatten(0, x.shape[:-1])


class InferenceFFN(nn.Module):
    """`AsymmetricFFN` in evaluation: the second product adds to what the residual's projection made."""

    def __init__(self, ffn: AsymmetricFFN):
        super().__init__()
        expanding, shrinking = (layer for layer in ffn.layers.modules() if isinstance(layer, nn.Linear))
        self.pre_norm = ffn.pre_norm
        self.expand = LinearReLU(expanding.weight, expanding.bias)
        self.shrinking_weight = constant(shrinking.weight)
        self.identity_weight = constant(ffn.identity_fc.weight)
        self.bias = constant(ffn.identity_fc.bias + shrinking.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(bs, n, embed_dims) of x (bs, n, in_dims)."""
        rows = self.pre_norm(x).flatten(0, 1)
        output = torch.addmm(self.bias, rows, self.identity_weight.t())
        output = output.addmm_(self.expand(rows), self.shrinking_weight.t())
        return output.unflatten(0, x.shape[:2])


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that no one trains."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _fused(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers, each linear one merged with the ReLU or the factors behind it."""
    found: list[nn.Module] = []
    for layer in layers:
        before = found[-1] if found else None
        if isinstance(layer, nn.ReLU) and isinstance(before, nn.Linear):
            found[-1] = LinearReLU(before.weight, before.bias)
        elif isinstance(layer, Scale) and isinstance(before, nn.Linear):
            found[-1] = _linear(before.weight * layer.scale[:, None], before.bias * layer.scale)
        elif isinstance(layer, (nn.Linear, nn.LayerNorm)):
            found.append(layer)
        else:
            raise TypeError(f"no form for inference of {type(layer).__name__} behind {type(before).__name__}")
    return found


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = constant(weight), constant(bias)
    return layer
