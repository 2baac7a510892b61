"""Small pieces that several modules of the detector are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reimplementation.models.autocast import without_autocast
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

    In bfloat16 a position 50 m away would be rounded to the next quarter of a metre before the network sees it.
    """

    def forward(self, coordinates: Tensor) -> Tensor:
        """(..., dims) of coordinates (..., in_dims)."""
        first, *others = self
        with without_autocast(coordinates.device):
            x = first(at_least_float32(coordinates))
        for layer in others:
            x = layer(x)
        return x


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dims: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
