"""Small random inputs, with which a forward is compared with the one that it replaces."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH, QUERIES = 2, 5


class Probe:
    """Draws tensors in float64 on the CPU; the same ones each time."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) / 4

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def queries(self, channels: int) -> Tensor:
        return self.normal(BATCH, QUERIES, channels)

    def rows(self, num_levels: int, *channels: int) -> Tensor:
        """Features of all pixels of `shapes`."""
        return self.normal(BATCH, sum(height * width for height, width in self.shapes(num_levels)), *channels)

    @staticmethod
    def shapes(num_levels: int) -> list[tuple[int, int]]:
        """(height, width) of each level: wider than high, and none like another."""
        return [(2 + level, 7 + level) for level in range(num_levels)]

    def shapes_in_tensors(self, num_levels: int) -> tuple[Tensor, Tensor]:
        """The same as a tensor, and the first rows."""
        shapes = torch.tensor(self.shapes(num_levels))
        rows = shapes.prod(-1)
        return shapes, rows.cumsum(0) - rows

    def half(self, num_levels: int) -> Tensor:
        """A mask of rows, True for half of them."""
        return self.rows(num_levels) > 0

    def references(self, num_levels: int, coordinates: int) -> Tensor:
        """Points (2 coordinates) or boxes (4) within the image."""
        return self.uniform(BATCH, QUERIES, num_levels, coordinates) * 0.8 + 0.1
