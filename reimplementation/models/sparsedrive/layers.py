"""Small pieces that several modules of the detector are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.models.plain import are_plain, calls_are_unseen, is_plain, weight_and_bias
from reimplementation.ops.autocast import without_autocast
from reimplementation.ops.dtypes import at_least_float32


def linear_relu_norm(in_dims: int, dims: int, num_linears: int, num_norms: int) -> list[nn.Module]:
    """``num_norms`` times: ``num_linears`` pairs of a linear layer and a ReLU, then a layer norm."""
    layers: list[nn.Module] = []
    for _ in range(num_norms):
        for _ in range(num_linears):
            layers += [nn.Linear(in_dims, dims), nn.ReLU(inplace=True)]
            in_dims = dims
        layers.append(nn.LayerNorm(dims))
    return layers


class CoordinateMLP(nn.Sequential):
    """An MLP whose input are coordinates: autocast leaves its first layer in full precision.

    In bfloat16 a position 50 m away would be rounded to the next quarter of a metre before the network sees it. Where
    nobody could tell that the layers are not called, each linear layer with its ReLU and its norm is one kernel, all in
    full precision.
    """

    def forward(self, coordinates: Tensor) -> Tensor:
        """(bs, n, dims) of coordinates (bs, n, in_dims)."""
        x = at_least_float32(coordinates)
        blocks = _plain_blocks(self, x)
        if blocks is not None:
            for weight, bias, norm_weight, norm_bias, eps in blocks:
                x = ops.linear_relu_norm(x, weight, bias, norm_weight, norm_bias, eps)
            return x
        first, *others = self
        with without_autocast(coordinates.device):
            x = first(x)
        for layer in others:
            x = layer(x)
        return x


def _plain_blocks(mlp: nn.Sequential, x: Tensor) -> list[tuple] | None:
    """The parameters of each linear layer with its ReLU and its norm; None where that is not what the layers are."""
    layers: list[Any] = list(mlp._modules.values())
    kinds = [nn.Linear, nn.ReLU, nn.LayerNorm] * (len(layers) // 3)
    if x.dim() != 3 or not calls_are_unseen() or len(kinds) != len(layers) or not all(map(is_plain, layers, kinds)):
        return None
    blocks = []
    for linear, norm in zip(layers[::3], layers[2::3]):
        parameters = *weight_and_bias(linear), *weight_and_bias(norm)
        if not are_plain((x, *parameters), x.dtype):
            return None
        blocks.append((*parameters, norm.eps))
    return blocks


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dims: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
