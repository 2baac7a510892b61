"""The sampling ops by their rules, in float64: what a call must return, and how far rounding may take it from that.

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

from tests.reference import Samples, samples_of_aggregation, samples_of_attention

RESULTS = ("output", "features' gradient", "locations' gradient", "weights' gradient")


@dataclass(frozen=True)
class Expected:
    """A result in float64, elementwise."""

    value: Tensor
    magnitude: Tensor  # the sum of the terms' magnitudes; not finite where the value may be so
    not_finite: Tensor  # where the value must not be finite
    num_terms: int


def sums(samples: Samples, grad_output: Tensor, times: Callable, magnitudes: bool) -> list[Tensor]:
    """Output and gradients, every product formed by ``times``, of the factors or of their magnitudes."""
    row, corner_weight, slope, exists = samples.corners()
    batch, num_rows, channels = samples.features.shape
    num_groups = samples.weights.shape[-1]
    size = torch.abs if magnitudes else torch.Tensor.clone
    features, weights, slope, grad_output = (size(t) for t in (samples.features, samples.weights, slope, grad_output))
    corners = samples.pixels(features, row)
    exists = exists[..., None]
    by_channel = weights.repeat_interleave(channels // num_groups, -1)[..., None, :]
    scale = times(corner_weight[..., None], by_channel)

    def existing(terms: Tensor) -> Tensor:
        return torch.where(exists, terms, 0.0)

    output = existing(times(scale, corners)).sum((2, 3))
    grad_rows = existing(times(scale, grad_output[:, :, None, None])).flatten(1, 3)
    index = row.flatten(1)[..., None].expand(-1, -1, channels)
    grad_features = features.new_zeros(batch, num_rows + 1, channels).scatter_add_(1, index, grad_rows)[:, :num_rows]
    dots = existing(times(corners, grad_output[:, :, None, None]))
    dots = dots.view(*row.shape, num_groups, channels // num_groups).sum(-1)
    grad_weights = existing(times(corner_weight[..., None], dots)).sum(3)
    along = existing(times(weights[..., None, :], dots)).sum(-1)
    grad_location = existing(times(slope, along[..., None])).sum(3)
    return [output, grad_features, grad_location, grad_weights]


def expected_of(samples: Samples, grad_output: Tensor) -> list[Expected]:
    batch, num_queries, num_samples, num_groups = samples.weights.shape
    channels = samples.features.shape[2]
    terms = (4 * num_samples, 4 * num_queries * num_samples, 4 * channels, 4 * channels)
    value = sums(samples, grad_output, torch.mul, magnitudes=False)
    magnitude = sums(samples, grad_output, torch.mul, magnitudes=True)
    if all(t.isfinite().all() for t in (samples.features, samples.weights, grad_output)):
        not_finite = [torch.zeros_like(t, dtype=torch.bool) for t in value]
    else:
        not_finite = [~t.isfinite() for t in sums(samples, grad_output, times_unless_zero, magnitudes=True)]
    return [Expected(*parts) for parts in zip(value, magnitude, not_finite, terms)]


def times_unless_zero(a: Tensor, b: Tensor) -> Tensor:
    """The product, and zero wherever a factor is zero, whatever the other is."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def deformable_aggregation(features, shapes, starts, location, weights, grad_output) -> list[Expected]:
    """What the op must return for operands on the CPU and a gradient of the output: output, then three gradients."""
    num_levels, num_groups = weights.shape[-2:]
    samples = samples_of_aggregation(features, shapes, starts, location, weights)
    output, grad_features, grad_location, grad_weights = expected_of(samples, grad_output.double())
    return [
        output,
        grad_features,
        reshaped(grad_location, lambda t: t.view(*weights.shape[:5], 2).sum(4), num_terms=num_levels * num_groups),
        reshaped(grad_weights, lambda t: t.view(weights.shape)),
    ]


def ms_deform_attn(value, shapes, starts, locations, weights, grad_output) -> list[Expected]:
    """As `deformable_aggregation`."""
    batch, _, num_heads, channels = value.shape
    num_queries = locations.shape[1]
    by_head = grad_output.double().view(batch, num_queries, num_heads, channels).transpose(1, 2)
    output, grad_value, grad_locations, grad_weights = expected_of(
        samples_of_attention(value, shapes, starts, locations, weights),
        by_head.reshape(batch * num_heads, num_queries, channels),
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
