"""Shapes of the ops that a sweep goes through, and inputs of a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from reimplementation.bench.feature_aggregation import FeatureAggregationInputs, feature_aggregation_inputs
from reimplementation.bench.inputs import AggregationInputs, AttentionInputs, OpInputs
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH

NUM_CAMERAS, NUM_GROUPS, NUM_HEADS = 6, 8, 8
STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Shape:
    """A size of an op: "aggregation" with 8 groups and 6 cameras, "fused" likewise, or "msda" with 8 heads.

    channels: of the output: all groups' or all heads' together.
    """

    op: str
    channels: int
    points: int
    levels: int
    batch_size: int
    queries: int = 900


def _aggregation(shape: Shape, dtype: torch.dtype, device: torch.device) -> AggregationInputs:
    """Six cameras of 704 x 256 pixels; every point is in one of them, anywhere."""
    generator = torch.Generator(device).manual_seed(0)
    random: dict[str, Any] = {"generator": generator, "device": device}
    levels = [(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in STRIDES[: shape.levels]]
    spatial_shape = torch.tensor([levels] * NUM_CAMERAS, device=device)
    rows = spatial_shape.prod(-1).flatten()
    points = (shape.batch_size, shape.queries, shape.points)
    camera = torch.randint(NUM_CAMERAS, points, **random)
    seen = F.one_hot(camera, NUM_CAMERAS).bool()[..., None]
    return AggregationInputs(
        torch.randn(shape.batch_size, int(rows.sum()), shape.channels, **random),
        spatial_shape,
        (rows.cumsum(0) - rows).view(NUM_CAMERAS, -1),
        torch.where(seen, torch.rand(*points, 1, 2, **random), -1.0),
        torch.rand(*points, NUM_CAMERAS, shape.levels, NUM_GROUPS, **random),
    ).to(device, dtype)


def _feature_aggregation(shape: Shape, dtype: torch.dtype, device: torch.device) -> FeatureAggregationInputs:
    """Boxes around the car, before the six cameras of 704 x 256 pixels."""
    return feature_aggregation_inputs(
        "rig",
        shape.batch_size,
        num_queries=shape.queries,
        num_points=shape.points,
        channels=shape.channels,
        num_groups=NUM_GROUPS,
        strides=STRIDES[: shape.levels],
        dtype=dtype,
        device=device,
    )


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """The levels of one image of 704 x 256 pixels; samples anywhere in it."""
    generator = torch.Generator(device).manual_seed(0)
    random: dict[str, Any] = {"generator": generator, "device": device}
    levels = [(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in STRIDES[: shape.levels]]
    spatial_shapes = torch.tensor(levels, device=device)
    rows = spatial_shapes.prod(-1)
    samples = (shape.batch_size, shape.queries, NUM_HEADS, shape.levels, shape.points)
    return AttentionInputs(
        torch.randn(shape.batch_size, int(rows.sum()), NUM_HEADS, shape.channels // NUM_HEADS, **random),
        spatial_shapes,
        rows.cumsum(0) - rows,
        torch.rand(*samples, 2, **random),
        torch.rand(*samples, **random),
    ).to(device, dtype)


INPUTS: dict[str, Callable[[Shape, torch.dtype, torch.device], OpInputs]] = {
    "aggregation": _aggregation,
    "fused": _feature_aggregation,
    "msda": _attention,
}
