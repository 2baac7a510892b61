"""Operands of every op, at sizes that a test can afford; `tests.ops.table` says which belong to which.

All are float64 on the CPU, or integers, and depend on the seed and the sizes alone. Locations are multiples of 2^-12,
so that pixel positions are exact in float32 too: a position that rounds across a pixel's edge would have another
gradient, and a comparison with float64 would measure luck.
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
    spare_rows: int = 0,
) -> AggregationInputs:
    """Cameras of different shapes; three points in ten fall outside the image.

    shapes: (num_cams, num_levels, 2); a tensor where there are no cameras or no levels. spare_rows: of no level.
    """
    generator = torch.Generator().manual_seed(seed)
    spatial_shape = torch.as_tensor(shapes)
    num_cams, num_levels = spatial_shape.shape[:2]
    rows = spatial_shape.prod(-1).flatten()
    starts = (rows.cumsum(0) - rows).view(num_cams, num_levels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = (batch_size, num_queries, num_points, num_cams)
    location = torch.rand(*pairs, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    return AggregationInputs(
        normal(batch_size, int(rows.sum()) + spare_rows, channels),
        spatial_shape,
        starts,
        quantized(location),
        normal(*pairs, num_levels, num_groups),
    )


def rig_inputs(seed: int = 0) -> AggregationInputs:
    """Boxes seen by six cameras, with few queries and channels."""
    inputs = aggregation_inputs(
        "rig",
        2,
        num_queries=16,
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
    """Every pair of coordinates from the edges of the image, of its pixels, and from beyond."""
    x, y = _special_coordinates()
    base = random_inputs(seed, batch_size=1, num_queries=x.numel(), num_points=1, shapes=(((8, 8), (1, 2)),) * 2)
    location = torch.stack([x, y], -1).view(1, -1, 1, 1, 2).repeat(1, 1, 1, 2, 1)
    return AggregationInputs(*list(base)[:3], location, base.weights)


def random_attention_inputs(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 7,
    num_heads: int = 3,
    channels: int = 8,
    num_points: int = 3,
    shapes=((9, 14), (5, 7), (1, 3)),
    spare_rows: int = 0,
) -> AttentionInputs:
    """Levels of odd shapes; half of the samples fall outside the image, most of these near it."""
    generator = torch.Generator().manual_seed(seed)
    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    rows = spatial_shapes.prod(-1)
    samples = (batch_size, num_queries, num_heads, len(spatial_shapes), num_points)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return AttentionInputs(
        normal(batch_size, int(rows.sum()) + spare_rows, num_heads, channels),
        spatial_shapes,
        rows.cumsum(0) - rows,
        quantized(locations),
        normal(*samples),
    )


def encoder_inputs(seed: int = 0) -> AttentionInputs:
    """A query at every pixel of a small pyramid."""
    inputs = attention_inputs("small-encoder", 1, dtype=torch.float64, seed=seed)
    value, shapes, starts, locations, weights = inputs
    return AttentionInputs(value, shapes, starts, quantized(locations), weights)


def attention_border_inputs(seed: int = 0) -> AttentionInputs:
    """As `border_inputs`, for attention."""
    x, y = _special_coordinates()
    value, shapes, starts, _, weights = random_attention_inputs(
        seed, batch_size=1, num_queries=x.numel(), num_heads=2, num_points=1, shapes=((8, 8), (1, 2))
    )
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2).repeat(1, 1, 2, 2, 1, 1)
    return AttentionInputs(value, shapes, starts, locations, weights)


def from_offsets(
    inputs: AttentionInputs, *, boxes: bool = False, shared: bool = False, scale: tuple[float, ...] | None = None
) -> list[torch.Tensor | None]:
    """The samples of attention's inputs by other operands: references, offsets, logits, and the levels' scales.

    Numbers of which a location is made are exact in float32, and so are the locations, where the levels' scales are
    powers of two: a multiple of ``STEP``, and an offset in pixels of its level, or in halves of boxes' sizes, which are
    powers of two, too. ``shared``: all levels have one reference point.
    """
    value, shapes, starts, locations, logits = inputs
    generator = torch.Generator().manual_seed(1)
    num_levels, num_points = logits.shape[3:]
    points = (*logits.shape[:2], 1 if shared else num_levels)
    places = quantized(torch.rand(*points, 2, generator=generator, dtype=torch.float64))
    away = locations - places[:, :, None, :, None]
    scales = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    if not boxes:
        return [value, shapes, starts, places, away * shapes.flip(-1)[:, None], logits, scales]
    sizes = 2.0 ** -torch.randint(0, 3, (*points, 2), generator=generator).double()
    by_level = torch.full((num_levels,), 1 / max(num_points, 1), dtype=torch.float64) if scales is None else scales
    offsets = away / (sizes[:, :, None, :, None] * by_level[:, None, None] / 2)
    return [value, shapes, starts, torch.cat([places, sizes], -1), offsets, logits, scales]


def random_offset_inputs(
    seed: int = 0, *, boxes: bool = True, shared: bool = False, scaled: bool = True, num_points: int = 4, **sizes
) -> list[torch.Tensor | None]:
    """Boxes, and scales of a power of two a level, unless that is asked for otherwise."""
    inputs = random_attention_inputs(seed, num_points=num_points, **sizes)
    scale = tuple(2.0 ** -(1 + level % 3) for level in range(len(inputs.spatial_shapes)))
    return from_offsets(inputs, boxes=boxes, shared=shared, scale=scale if scaled else None)


def random_projection(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 5,
    num_points: int = 4,
    num_cams: int = 3,
    with_image_size: bool = True,
    depths: tuple[float, ...] = (8.0, 20.0, -15.0, 8.0),
) -> list[torch.Tensor | None]:
    """Key points around these depths, in turn, before cameras at the origin that look along z, and image sizes."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(batch_size, num_queries, num_points, 3, generator=generator, dtype=torch.float64) * 3
    points[..., 2] += torch.tensor(depths, dtype=torch.float64)[torch.arange(num_points) % len(depths)]
    matrices = torch.randn(batch_size, num_cams, 4, 4, generator=generator, dtype=torch.float64)
    matrices[:, :, 2] = matrices[:, :, 2] * 0.1 + torch.tensor([0, 0, 1, 0.0])
    sizes = torch.rand(batch_size, num_cams, 2, generator=generator, dtype=torch.float64) + 2
    return [points, matrices, sizes if with_image_size else None]


def random_boxes(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 5,
    num_fixed: int = 4,
    num_learnable: int | None = 3,
    columns: int = 11,
) -> list[torch.Tensor | None]:
    """Box anchors of that many columns, fixed places, and logits of the learnable ones, where there are any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    anchor, places = normal(batch_size, num_queries, columns), normal(num_fixed, 3)
    return [anchor, places, None if num_learnable is None else normal(batch_size, num_queries, num_learnable * 3)]


def random_layer(
    seed: int = 0, *, batch_size: int = 2, num_queries: int = 5, in_features: int = 7, out_features: int = 24
) -> list[torch.Tensor]:
    """Features, weight and bias of a linear layer, and those of a norm.

    Where one output of a row is positive, or two are all there are, its norm takes away all that they had, and the
    derivative is what rounding leaves: so there are a few more.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = normal(out_features, in_features), normal(out_features)
    return [normal(batch_size, num_queries, in_features), *layer, normal(out_features), normal(out_features)]


def with_memory_reversed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with the first dimension innermost in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)
