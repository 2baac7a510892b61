"""Inputs for both ops: random, rig, encoder and border geometries, at sizes that a test can afford.

Locations are multiples of 2^-12, so that pixel positions are exact in float32 too: a position that rounds across a
pixel's edge would have another gradient, and a comparison with float64 would measure luck.
"""

from __future__ import annotations

import torch

from reimplementation.bench.inputs import AggregationInputs, AttentionInputs, aggregation_inputs, attention_inputs

STEP = 2.0**-12


def quantized(location: torch.Tensor) -> torch.Tensor:
    return (location / STEP).round() * STEP


def random_inputs(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 7,
    num_points: int = 3,
    channels: int = 32,
    num_groups: int = 4,
    shapes=(((9, 14), (5, 7)), ((9, 14), (5, 7)), ((6, 4), (1, 3))),
) -> AggregationInputs:
    """Cameras of different shapes; three points in ten fall outside the image. float64, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    spatial_shape = torch.tensor(shapes).view(len(shapes), -1, 2)
    num_cams, num_levels = spatial_shape.shape[:2]
    rows = spatial_shape.prod(-1).flatten()
    starts = (rows.cumsum(0) - rows).view(num_cams, num_levels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = (batch_size, num_queries, num_points, num_cams)
    location = torch.rand(*pairs, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    return AggregationInputs(
        normal(batch_size, int(rows.sum()), channels),
        spatial_shape,
        starts,
        quantized(location),
        normal(*pairs, num_levels, num_groups),
    )


def rig_inputs(seed: int = 0) -> AggregationInputs:
    """Boxes seen by six cameras, with few queries and channels; float64, on the CPU."""
    inputs = aggregation_inputs(
        "rig",
        2,
        num_queries=40,
        channels=32,
        num_groups=8,
        strides=(16, 32),
        dtype=torch.float64,
        seed=seed,
    )
    location = quantized(inputs.sampling_location.clamp(-2, 3))
    return AggregationInputs(*list(inputs)[:3], location, inputs.weights)


def _special_coordinates() -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of coordinates at the edges of an image, of its 8 pixels and of their footprints, and beyond."""
    largest = 1 - 2.0**-24  # the last float32 below 1
    special = [-1e30, -0.5, -STEP, 0.0, 2.0**-24, STEP, 0.5, 1 - STEP, largest, 1.0, 1 + STEP, 7.0, 1e30]
    special += [float("nan"), float("inf"), float("-inf")]
    special += [i / 8 for i in range(1, 8)] + [(2 * i + 1) / 16 for i in range(8)]  # edges and centres of pixels
    special += [edge + step for edge in (-1 / 16, 17 / 16) for step in (-STEP, 0, STEP)]  # half a pixel outside
    x, y = torch.meshgrid(*[torch.tensor(special, dtype=torch.float64)] * 2, indexing="ij")
    return x, y


def border_inputs(seed: int = 0) -> AggregationInputs:
    """Every pair of coordinates from the edges of the image, of its pixels, and from beyond; float64, on the CPU."""
    x, y = _special_coordinates()
    base = random_inputs(seed, batch_size=1, num_queries=x.numel(), num_points=1, shapes=(((8, 8), (1, 2)),) * 2)
    location = torch.stack([x, y], -1).view(1, -1, 1, 1, 2).repeat(1, 1, 1, 2, 1)
    return AggregationInputs(*list(base)[:3], location, base.weights)


GEOMETRIES = {"random": random_inputs, "rig": rig_inputs, "border": border_inputs}


def random_attention_inputs(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 7,
    num_heads: int = 3,
    channels: int = 8,
    num_points: int = 3,
    shapes=((9, 14), (5, 7), (1, 3)),
) -> AttentionInputs:
    """Levels of odd shapes; half of the samples fall outside the image, most of these near it. float64, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    rows = spatial_shapes.prod(-1)
    samples = (batch_size, num_queries, num_heads, len(spatial_shapes), num_points)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return AttentionInputs(
        normal(batch_size, int(rows.sum()), num_heads, channels),
        spatial_shapes,
        rows.cumsum(0) - rows,
        quantized(locations),
        normal(*samples),
    )


def encoder_inputs(seed: int = 0) -> AttentionInputs:
    """A query at every pixel of a small pyramid; float64, on the CPU."""
    inputs = attention_inputs("small-encoder", 2, dtype=torch.float64, seed=seed)
    value, shapes, starts, locations, weights = inputs
    return AttentionInputs(value, shapes, starts, quantized(locations), weights)


def attention_border_inputs(seed: int = 0) -> AttentionInputs:
    """As `border_inputs`, for attention; float64, on the CPU."""
    x, y = _special_coordinates()
    value, shapes, starts, _, weights = random_attention_inputs(
        seed, batch_size=1, num_queries=x.numel(), num_heads=2, num_points=1, shapes=((8, 8), (1, 2))
    )
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2).repeat(1, 1, 2, 2, 1, 1)
    return AttentionInputs(value, shapes, starts, locations, weights)


ATTENTION_GEOMETRIES = {
    "random": random_attention_inputs,
    "encoder": encoder_inputs,
    "border": attention_border_inputs,
}


def with_memory_reversed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with the first dimension innermost in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)
