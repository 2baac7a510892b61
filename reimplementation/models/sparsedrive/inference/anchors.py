"""The four networks that embed a box, side by side in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.sparsedrive.anchor_encoder import BoxAnchorEncoder
from reimplementation.ops.dtypes import as_dtype

from .rows import LinearReLU, constant

BRANCHES = ("pos_fc", "size_fc", "yaw_fc", "vel_fc")  # in the order in which an anchor holds what they read


class InferenceBoxEncoder(nn.Module):
    """`BoxAnchorEncoder` with one product for the four layers of a depth, and one norm.

    The branches are of different widths. Here each has the width of the widest, its channels repeated: neither their
    mean nor their variance changes by that, so that one layer norm over equal rows serves all. What follows reads each
    channel once. The norms' own factors and offsets are part of the product behind them.

    Args:
        encoder: whose parameters to take; its widths divide the largest one.
        dtype: of the embedding. The first product and its norm are in the encoder's own, as anchors are.
    """

    def __init__(self, encoder: BoxAnchorEncoder, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        branches = [_Branch(getattr(encoder, name)) for name in BRANCHES]
        self.width = max(branch.dims for branch in branches)
        self.eps = branches[0].norms[0].eps
        depth = len(branches[0].linears)
        weights, biases = zip(*(self._side_by_side(branches, index) for index in range(depth)))
        self.layers = nn.ModuleList(map(LinearReLU, weights, biases))
        self.layers[1:].to(dtype)
        weight, bias = zip(*(branch.last_norm(self.width) for branch in branches))
        self.weight = constant(torch.block_diag(*weight).to(dtype))
        self.bias = constant(torch.cat(bias).to(dtype))

    def forward(self, anchor: Tensor) -> Tensor:
        """Embeddings (bs, n, embed_dims) of anchors (bs, n, 11)."""
        rows = anchor.flatten(0, 1)
        layer: Any
        for layer in self.layers:
            activated = layer(as_dtype(rows, layer.weight.dtype))
            rows = F.layer_norm(activated.view(-1, self.width), (self.width,), eps=self.eps).view_as(activated)
        return torch.addmm(self.bias, as_dtype(rows, self.dtype), self.weight.t()).unflatten(0, anchor.shape[:2])

    def _side_by_side(self, branches: list[_Branch], index: int) -> tuple[Tensor, Tensor]:
        """The weight and bias of the layers of a depth."""
        weight, bias = zip(*(branch.layer(index, self.width) for branch in branches))
        return torch.block_diag(*weight), torch.cat(bias)


class _Branch:
    """One MLP: linear layers, each with a ReLU and a norm behind it."""

    def __init__(self, layers: nn.Sequential):
        self.linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm)]
        self.dims = self.linears[0].out_features

    def layer(self, index: int, width: int) -> tuple[Tensor, Tensor]:
        """Weight (width, in_dims or width) and bias (width,): outputs are repeated, of inputs the first are read."""
        linear = self.linears[index]
        weight: Tensor = linear.weight
        bias: Tensor = linear.bias
        if index > 0:
            norm = self.norms[index - 1]
            bias = bias + weight @ norm.bias
            weight = F.pad(weight * norm.weight, (0, width - self.dims))
        return weight.repeat(width // self.dims, 1), bias.repeat(width // self.dims)

    def last_norm(self, width: int) -> tuple[Tensor, Tensor]:
        """Weight (dims, width) and bias (dims,) that make the branch's output of what was normalised."""
        norm = self.norms[-1]
        return F.pad(torch.diag(norm.weight), (0, width - self.dims)), norm.bias
