"""Both ops by their rules, in float64: what a call must return, and how far rounding may take it from that.

Nothing is shared with the package, and no derivative is left to autograd. Every result is a sum of products, one for
each corner of a footprint; summed once more with all factors made positive, they bound the rounding errors, however the
terms cancel. The same sums say where NaNs and infinities go: a result is finite where none of its terms has a factor
that is not, and it is not finite where such a factor meets factors other than zero. Between these two, where it meets a
zero (0 * inf), arithmetic gives NaN but an implementation may leave the product out; either is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RESULTS = ("output", "features' gradient", "locations' gradient", "weights' gradient")


@dataclass(frozen=True)
class Expected:
    """A result in float64, elementwise."""

    value: Tensor
    magnitude: Tensor  # the sum of the terms' magnitudes; not finite where the value may be so
    not_finite: Tensor  # where the value must not be finite
    num_terms: int


@dataclass(frozen=True)
class Samples:
    """What both ops come down to: K samples per query in one image each, G weights a sample, shared by C / G channels.

    features (B, R, C), location (B, Q, K, 2), weights (B, Q, K, G), all float64; levels: for each of the K its
    (height, width, first row), which are zero where the metadata reaches beyond the R rows.
    """

    features: Tensor
    location: Tensor
    weights: Tensor
    levels: Tensor
    unit_square_only: bool

    def corners(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the four corners of each sample, (B, Q, K, 4, ...): row, weight, slopes (x and y), whether they exist."""
        height, width, start = self.levels.unbind(-1)
        size = torch.stack([width, height], -1).double()
        pixel = self.location * size - 0.5
        if self.unit_square_only:
            live = ((self.location > 0) & (self.location < 1)).all(-1)
        else:
            live = ((pixel > -1) & (pixel < size)).all(-1)
        live = live & (height > 0)
        pixel = torch.where(live[..., None], pixel, 0.0)
        low = pixel.floor()
        (x, y), (fraction_x, fraction_y) = low.unbind(-1), (pixel - low).unbind(-1)
        rows, weights, slopes, inside = [], [], [], []
        for down in (0, 1):
            for right in (0, 1):
                column, line = (x + right).long(), (y + down).long()
                inside.append(live & (column >= 0) & (column < width) & (line >= 0) & (line < height))
                rows.append(start + line * width + column)
                along_x, along_y = (fraction_x if right else 1 - fraction_x), (fraction_y if down else 1 - fraction_y)
                weights.append(along_x * along_y)
                slope_x, slope_y = (2 * right - 1) * width * along_y, (2 * down - 1) * height * along_x
                slopes.append(torch.stack([slope_x, slope_y], -1))
        exists = torch.stack(inside, -1)
        # What does not exist reads a row of zeros behind the last one.
        row = torch.where(exists, torch.stack(rows, -1), self.features.shape[1])
        return row, torch.stack(weights, -1), torch.stack(slopes, -2), exists

    def sums(self, grad_output: Tensor, times: Callable, magnitudes: bool) -> list[Tensor]:
        """Output and gradients, every product formed by ``times``, of the factors or of their magnitudes."""
        row, corner_weight, slope, exists = self.corners()
        batch, num_rows, channels = self.features.shape
        num_queries, num_samples, num_groups = self.weights.shape[1:]
        size = torch.abs if magnitudes else torch.Tensor.clone
        features, weights, slope, grad_output = (size(t) for t in (self.features, self.weights, slope, grad_output))

        padded = torch.cat([features, features.new_zeros(batch, 1, channels)], 1)
        index = row.flatten(1)[..., None].expand(-1, -1, channels)
        corners = padded.gather(1, index).view(*row.shape, channels)  # (B, Q, K, 4, C)
        exists = exists[..., None]
        by_channel = weights.repeat_interleave(channels // num_groups, -1)[..., None, :]
        scale = times(corner_weight[..., None], by_channel)

        def existing(terms: Tensor) -> Tensor:
            return torch.where(exists, terms, 0.0)

        output = existing(times(scale, corners)).sum((2, 3))
        grad_rows = existing(times(scale, grad_output[:, :, None, None])).flatten(1, 3)
        grad_features = torch.zeros_like(padded).scatter_add_(1, index, grad_rows)[:, :num_rows]
        dots = existing(times(corners, grad_output[:, :, None, None]))
        dots = dots.view(*row.shape, num_groups, channels // num_groups).sum(-1)
        grad_weights = existing(times(corner_weight[..., None], dots)).sum(3)
        along = existing(times(weights[..., None, :], dots)).sum(-1)
        grad_location = existing(times(slope, along[..., None])).sum(3)
        return [output, grad_features, grad_location, grad_weights]

    def expected(self, grad_output: Tensor) -> list[Expected]:
        batch, num_queries, num_samples, num_groups = self.weights.shape
        channels = self.features.shape[2]
        terms = (4 * num_samples, 4 * num_queries * num_samples, 4 * channels, 4 * channels)
        value = self.sums(grad_output, torch.mul, magnitudes=False)
        magnitude = self.sums(grad_output, torch.mul, magnitudes=True)
        if all(t.isfinite().all() for t in (self.features, self.weights, grad_output)):
            not_finite = [torch.zeros_like(t, dtype=torch.bool) for t in value]
        else:
            not_finite = [~t.isfinite() for t in self.sums(grad_output, times_unless_zero, magnitudes=True)]
        return [Expected(*parts) for parts in zip(value, magnitude, not_finite, terms)]


def times_unless_zero(a: Tensor, b: Tensor) -> Tensor:
    """The product, and zero wherever a factor is zero, whatever the other is."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def fits(height: int, width: int, start: int, num_rows: int) -> bool:
    """Whether a level lies within its features' rows; of Python's integers, which do not overflow."""
    return height >= 0 and width >= 0 and start >= 0 and start + height * width <= num_rows


def fitting_levels(shapes: Tensor, starts: Tensor, num_rows: int) -> Tensor:
    """(levels, 3) height, width and first row; all zero for a level that is empty or does not fit."""
    rows = [
        (height, width, start) if fits(height, width, start, num_rows) and height * width > 0 else (0, 0, 0)
        for (height, width), start in zip(shapes.reshape(-1, 2).tolist(), starts.reshape(-1).tolist())
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def deformable_aggregation(features, shapes, starts, location, weights, grad_output) -> list[Expected]:
    """What the op must return for operands on the CPU and a gradient of the output: output, then three gradients."""
    batch, num_queries, num_points, num_cams, num_levels, num_groups = weights.shape
    levels = fitting_levels(shapes, starts, features.shape[1]).view(num_cams, num_levels, 3)
    levels = levels.expand(num_points, -1, -1, -1).reshape(-1, 3)
    every_level = location.double()[:, :, :, :, None].expand(-1, -1, -1, -1, num_levels, -1)
    samples = (batch, num_queries, num_points * num_cams * num_levels)
    output, grad_features, grad_location, grad_weights = Samples(
        features.double(),
        every_level.reshape(*samples, 2),
        weights.double().reshape(*samples, num_groups),
        levels,
        unit_square_only=True,
    ).expected(grad_output.double())
    return [
        output,
        grad_features,
        reshaped(grad_location, lambda t: t.view(*weights.shape[:5], 2).sum(4), num_terms=num_levels * num_groups),
        reshaped(grad_weights, lambda t: t.view(weights.shape)),
    ]


def ms_deform_attn(value, shapes, starts, locations, weights, grad_output) -> list[Expected]:
    """As `deformable_aggregation`. Every head is an image of its own: the batch of samples is that of (N, M)."""
    batch, num_values, num_heads, channels = value.shape
    num_queries, num_levels, num_points = locations.shape[1], locations.shape[3], locations.shape[4]
    levels = fitting_levels(shapes, starts, num_values).repeat_interleave(num_points, 0)
    samples = (batch * num_heads, num_queries, num_levels * num_points)
    output, grad_value, grad_locations, grad_weights = Samples(
        value.double().transpose(1, 2).reshape(batch * num_heads, num_values, channels),
        locations.double().transpose(1, 2).reshape(*samples, 2),
        weights.double().transpose(1, 2).reshape(*samples, 1),
        levels,
        unit_square_only=False,
    ).expected(
        grad_output.double()
        .view(batch, num_queries, num_heads, channels)
        .transpose(1, 2)
        .reshape(batch * num_heads, num_queries, channels)
    )

    def heads_inside(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        by_head = (batch, num_heads, shape[1], *shape[3:])
        return lambda t: t.view(by_head).transpose(1, 2).reshape(shape)

    return [
        reshaped(output, lambda t: heads_inside((batch, num_queries, num_heads, channels))(t).flatten(2)),
        reshaped(grad_value, heads_inside(tuple(value.shape))),
        reshaped(grad_locations, heads_inside(tuple(locations.shape))),
        reshaped(grad_weights, heads_inside(tuple(weights.shape))),
    ]


def reshaped(expected: Expected, shape: Callable[[Tensor], Tensor], num_terms: int = 1) -> Expected:
    """The result in an operand's shape; ``shape`` may sum, which makes the terms ``num_terms`` times as many."""
    value, magnitude = shape(expected.value), shape(expected.magnitude)
    not_finite = shape(expected.not_finite.double()) > 0
    return Expected(value, magnitude, not_finite, expected.num_terms * num_terms)


def rounding(expected: Expected, compute: torch.dtype, stored: Iterable[torch.dtype], partial_sums: int = 0) -> Tensor:
    """How far a result may be from its expected value: errors of the sum, of its factors, and of storing it.

    Args:
        compute: the dtype of sums. Errors of that many terms add up like steps in random directions.
        stored: the dtypes that the result is rounded to on its way.
        partial_sums: how many partial sums are rounded to them before they are added; 0 for one rounding, of the sum.
    """
    tolerance = (16 + 4 * math.sqrt(expected.num_terms)) * torch.finfo(compute).eps * expected.magnitude
    tolerance = tolerance + expected.num_terms * torch.finfo(compute).tiny
    largest = expected.magnitude * partial_sums if partial_sums else expected.value.abs()
    for dtype in stored:
        unit = torch.finfo(dtype).eps
        tolerance = tolerance + unit * largest + max(partial_sums, 1) * unit * torch.finfo(dtype).tiny
    return tolerance
