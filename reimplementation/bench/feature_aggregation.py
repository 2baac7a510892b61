"""Inputs of deformable feature aggregation: those of deformable aggregation before projection and softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reimplementation.bench.inputs import DENSE_CAMERAS, EMBED_DIMS, NUM_GROUPS, STRIDES, OpInputs, pyramid
from reimplementation.bench.key_points import key_points


@dataclass(frozen=True)
class FeatureAggregationInputs(OpInputs):
    """The operands of `reimplementation.ops.deformable_feature_aggregation`, in its order."""

    feature_maps: Tensor
    spatial_shape: Tensor
    scale_start_index: Tensor
    key_points: Tensor
    projection_mat: Tensor
    image_wh: Tensor | None
    logits: Tensor
    camera_logits: Tensor
    keep: Tensor | None = None

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype | None, ...]:
        """Features and logits in ``dtype``, the cameras' arithmetic in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return dtype, None, None, wide, wide, wide, dtype, dtype, None


def feature_aggregation_inputs(
    geometry: str = "rig",
    batch_size: int = 1,
    *,
    num_queries: int = 900,
    num_points: int = 13,
    channels: int = EMBED_DIMS,
    num_groups: int = NUM_GROUPS,
    strides: tuple[int, ...] = STRIDES,
    attn_drop: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> FeatureAggregationInputs:
    """Random features and logits, and key points where a geometry says.

    Args:
        geometry: one of `key_points.GEOMETRIES`, as for `inputs.aggregation_inputs`; or "dense", random points, each in
            every one of six cameras.
        batch_size, num_queries, num_points, channels, num_groups: sizes.
        strides: of the pyramid's levels, on 704 x 256 images.
        attn_drop: the share of pairs that is left out; 0: there are no flags.
        dtype: of features and logits; the others are float32, or float64 with float64.
        device: of everything; the numbers do not depend on it.
        seed: of the random generator.
    """
    generator = torch.Generator().manual_seed(seed)
    if geometry == "dense":
        points, projection, image_wh = _seen_by_all(batch_size, num_queries, num_points, generator)
    else:
        rig, places = key_points(geometry, batch_size, num_queries, num_points, seed)
        points = torch.from_numpy(places)
        projection = torch.from_numpy(rig.projection_mat).repeat(batch_size, 1, 1, 1)
        image_wh = torch.from_numpy(rig.image_wh).double().repeat(batch_size, 1, 1)
    num_cams = projection.shape[1]
    spatial_shape, scale_start_index, num_rows = pyramid(num_cams, strides)
    width = len(strides) * num_points * num_groups
    pairs = (batch_size, num_queries, num_cams, num_points)
    return FeatureAggregationInputs(
        torch.randn(batch_size, num_rows, channels, generator=generator),
        spatial_shape,
        scale_start_index,
        points,
        projection,
        image_wh,
        torch.randn(batch_size, num_queries, width, generator=generator),
        torch.randn(batch_size, num_cams, width, generator=generator),
        torch.rand(pairs, generator=generator) > attn_drop if attn_drop else None,
    ).to(device, dtype)


def _seen_by_all(
    batch_size: int, num_queries: int, num_points: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, None]:
    """Points of a disc a metre before cameras in one place, each turned another way around the line of sight."""
    shape = (batch_size, num_queries, num_points)
    radius = 0.49 * torch.rand(shape, generator=generator, dtype=torch.float64).sqrt()
    angle = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.ones_like(radius)], dim=-1)
    turn = 2 * math.pi * torch.arange(DENSE_CAMERAS, dtype=torch.float64) / DENSE_CAMERAS
    projection = torch.eye(4, dtype=torch.float64).repeat(DENSE_CAMERAS, 1, 1)
    projection[:, 0, 0], projection[:, 0, 1], projection[:, 0, 2] = turn.cos(), -turn.sin(), 0.5
    projection[:, 1, 0], projection[:, 1, 1], projection[:, 1, 2] = turn.sin(), turn.cos(), 0.5
    return points, projection.expand(batch_size, -1, 4, 4), None
