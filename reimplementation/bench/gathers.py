"""Which rows an op must gather: the addresses of a case, in the order in which the kernels walk them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.feature_aggregation import FeatureAggregationInputs
from reimplementation.bench.inputs import AggregationInputs, AttentionInputs, OpInputs

CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # x, y of a footprint's four pixels, from its first


@dataclass(frozen=True)
class Gathers:
    """Rows of a table, bag by bag; a bag is what one sum of the output reads.

    table: (num_rows, channels), a view of the features.
    rows: (gathered rows,) int32. A footprint has up to four: pixels outside its level are not there to be read.
    starts: (num_bags + 1,) int64, where each bag begins in ``rows``. A bag is a (batch, query) of deformable
        aggregation, a (batch, head, query) of multi-scale deformable attention.
    """

    table: Tensor
    rows: Tensor
    starts: Tensor

    @property
    def row_bytes(self) -> int:
        return self.table.shape[1] * self.table.element_size()

    @property
    def gathered_bytes(self) -> int:
        """Gathered rows x channels of a row x bytes of a channel."""
        return self.rows.numel() * self.row_bytes


@singledispatch
def gathers(inputs: OpInputs) -> Gathers:
    """The rows that a forward pass on these inputs reads; TypeError where nobody told which."""
    raise TypeError(f"the rows of {type(inputs).__name__} are not known: gathers has no function for it")


@gathers.register
def _aggregation(inputs: AggregationInputs) -> Gathers:
    features, shapes, starts, locations, _ = inputs
    batch_size, num_rows, channels = features.shape
    visible = ((locations > 0) & (locations < 1)).all(-1)
    pixels = locations[..., None, :] * shapes.flip(-1) - 0.5  # (bs, queries, points, cams, levels, 2)
    rows, inside = _corners(pixels, shapes, starts)
    rows += _along(torch.arange(batch_size, device=rows.device) * num_rows, rows)
    inside &= visible[..., None, None]
    order = (0, 1, 4, 3, 2, 5)  # a query's rows level by level, camera by camera
    return _bags(features.view(-1, channels), rows.permute(order), inside.permute(order), bag_dims=2)


@gathers.register
def _feature_aggregation(inputs: FeatureAggregationInputs) -> Gathers:
    features, shapes, starts, points, projection, image_wh, *_ = inputs
    locations = ops.project_points(points, projection, image_wh)
    return _aggregation(AggregationInputs(features, shapes, starts, locations, features))


@gathers.register
def _attention(inputs: AttentionInputs) -> Gathers:
    value, shapes, starts, locations, _ = inputs
    num_rows, num_heads, channels = value.shape[1:]
    sizes = shapes.flip(-1)[:, None]
    pixels = locations * sizes - 0.5  # (N, Lq, M, L, P, 2)
    rows, inside = _corners(pixels, shapes[:, None], starts[:, None])
    rows += _along(torch.arange(len(value), device=rows.device) * num_rows, rows)
    rows = rows * num_heads + torch.arange(num_heads, device=rows.device)[:, None, None, None]
    inside &= ((pixels > -1) & (pixels < sizes)).all(-1)[..., None]
    order = (0, 2, 1, 3, 4, 5)  # neighbouring bags are neighbouring queries of one head
    return _bags(value.reshape(-1, channels), rows.permute(order), inside.permute(order), bag_dims=3)


def _corners(pixels: Tensor, shapes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., 4) of the corners of footprints at pixel positions (..., 2), and which of them lie in the level."""
    height, width = shapes[..., None].unbind(-2)
    first = pixels.floor()
    x, y = (
        (first[..., axis, None] + first.new_tensor(offsets)).clamp(-1, 2**30).long()
        for axis, offsets in enumerate(zip(*CORNERS))
    )
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return starts[..., None] + y * width + x, inside


def _along(of_batch: Tensor, rows: Tensor) -> Tensor:
    """A number for each image of the batch, shaped to be added to rows (batch, ...)."""
    return of_batch.view(-1, *[1] * (rows.dim() - 1))


def _bags(table: Tensor, rows: Tensor, inside: Tensor, bag_dims: int) -> Gathers:
    counts = inside.flatten(bag_dims).sum(-1).flatten()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Gathers(table, rows[inside].int(), starts)
