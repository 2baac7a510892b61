"""Look at an image through multi-scale deformable attention: RGB as values, heads that look all around."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from reimplementation import ops
from reimplementation.models.ms_deform_attn import initial_offsets

STRIDES = (4, 8, 16, 32)
NUM_HEADS, NUM_POINTS = 8, 4
GRID = (3, 9)  # rows and columns of queries


@dataclass(frozen=True, eq=False)
class Reading:
    """What the op read around each query.

    places     (num_queries, 2) float64 (x, y) of the queries, normalised to [0, 1]
    locations  (num_queries, num_heads, num_levels, num_points, 2) float32 (x, y), likewise
    colors     (num_queries, num_heads, 3) float64 RGB in [0, 255], read by each head
    error      largest difference of colors to the same in float64 and plain PyTorch, in 1/255
    """

    places: np.ndarray
    locations: np.ndarray
    colors: np.ndarray
    error: float


def read_colors(image: np.ndarray) -> Reading:
    """Attend to the RGB pyramid of an image (H, W, 3) uint8, strides 4, 8, 16, 32, from a grid of queries.

    Heads sample where those of a new `reimplementation.models.MSDeformAttn` do, with its equal weights: each head in a
    direction of its own, 1 to 4 pixels of every level away. A head reads the mean colour of its 16 samples.
    """
    levels = color_pyramid(image)
    spatial_shapes = torch.tensor([level.shape[1:] for level in levels])
    rows = spatial_shapes.prod(-1)
    colors = torch.cat([level.flatten(1) for level in levels], 1).t()  # (S, 3)
    value = colors[None, :, None].expand(-1, -1, NUM_HEADS, -1).contiguous()

    places = _grid(*GRID)
    offsets = initial_offsets(NUM_HEADS, NUM_POINTS)[:, None] / spatial_shapes.flip(-1)[:, None]
    locations = places[None, :, None, None, None].float() + offsets
    weights = torch.full(locations.shape[:-1], 1 / (len(levels) * NUM_POINTS))
    level_start_index = rows.cumsum(0) - rows

    read = ops.ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights).double()
    with ops.use_backend("grid_sample"):
        exact = ops.ms_deform_attn(
            value.double(), spatial_shapes, level_start_index, locations.double(), weights.double()
        )
    return Reading(
        places.numpy(),
        locations[0].numpy(),
        read[0].unflatten(-1, (NUM_HEADS, 3)).numpy() * 255,
        (read - exact).abs().max().item() * 255,
    )


def color_pyramid(image: np.ndarray) -> list[Tensor]:
    """An image (H, W, 3) uint8 as levels (3, H / stride, W / stride) in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    return [avg_pool2d(pixels, stride) for stride in STRIDES]


def _grid(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2) float64: the centres (x, y) of equal cells of the unit square."""
    y, x = torch.meshgrid(
        (torch.arange(rows, dtype=torch.float64) + 0.5) / rows,
        (torch.arange(columns, dtype=torch.float64) + 0.5) / columns,
        indexing="ij",
    )
    return torch.stack([x, y], -1).view(-1, 2)
