"""Positions that are added to the embedded patches: Fourier features, or one learned vector for each place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.ops.autocast import without_autocast
from reimplementation.ops.dtypes import at_least_float32

from .initialization import STD, init_layers

RESIZE_MODES = {2: "bicubic", 3: "trilinear"}  # by the number of axes


class FourierPositions(nn.Module):
    """Learned Fourier features of the place (arXiv 2106.02795), then a linear layer; of any grid, of two or three axes.

    Args:
        hidden_size: C, even.
        num_axes: of the grid.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, hidden_size: int, num_axes: int, **factory: Any):
        super().__init__()
        self.w_fourier = nn.Parameter(torch.empty(num_axes, hidden_size // 2, **factory))
        self.w_fc1 = nn.Linear(hidden_size, hidden_size, **factory)
        nn.init.normal_(self.w_fourier)
        init_layers(self.w_fc1)

    def forward(self, size: Sequence[int]) -> Tensor:
        """(1, L, C) for a grid of L places; the features are computed in float32."""
        with without_autocast(self.w_fourier.device):
            features = fourier_features(size, at_least_float32(self.w_fourier))
            return self.w_fc1(features.to(self.w_fc1.weight.dtype))[None]


class LearnedPositions(nn.Module):
    """A learned vector for each place of a grid, resized for grids of other sizes.

    Args:
        hidden_size: C, even.
        size: of the grid, two or three axes.
        dropout: in training.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, hidden_size: int, size: Sequence[int], dropout: float = 0.1, **factory: Any):
        super().__init__()
        self.size = tuple(size)
        self.positions = nn.Parameter(torch.empty(math.prod(size), hidden_size, **factory))
        self.dropout = nn.Dropout(dropout)
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        """Random Fourier features, so that neighbours begin alike, with a mean of 0 and a deviation of 0.02."""
        weights = torch.randn(len(self.size), self.positions.shape[1] // 2, device=self.positions.device)
        features = fourier_features(self.size, weights)
        self.positions.copy_((features - features.mean()) * (STD / features.std()))

    def forward(self, size: Sequence[int]) -> Tensor:
        """(1, L, C) for a grid of L places."""
        return self.dropout(self._resized(tuple(size)))[None]

    @torch.no_grad()
    def expand_positions(self, size: Sequence[int]) -> None:
        """Make another size the grid's own: the resized positions become the parameter."""
        positions = self._resized(tuple(size)).clone()
        self.positions = nn.Parameter(positions, requires_grad=self.positions.requires_grad)
        self.size = tuple(size)

    def _resized(self, size: tuple[int, ...]) -> Tensor:
        """(L, C): as they are, or interpolated (bicubic for two axes, trilinear for three) in at least float32."""
        if size == self.size:
            return self.positions
        grid = at_least_float32(self.positions).T.unflatten(1, self.size)[None]
        resized = F.interpolate(grid, size=size, mode=RESIZE_MODES[len(size)], align_corners=False)
        return resized[0].flatten(1).T.to(self.positions.dtype)


def fourier_features(size: Sequence[int], weights: Tensor) -> Tensor:
    """(L, C): sines and cosines of each place's coordinates times ``weights`` (axes, C / 2).

    Coordinates are in [-1, 1] with both ends. The square root of C / 2 divides features, whose length is then 1.
    """
    axes = [torch.linspace(-1, 1, count, device=weights.device, dtype=weights.dtype) for count in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    angles = grid @ weights
    return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(weights.shape[1])
