"""Inputs of the sizes that people run, for benchmarks and tests: SparseDrive's cameras, pyramid and queries."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from reimplementation.rig import nuscenes_like_rig
from reimplementation.scene import IMAGE_HEIGHT, IMAGE_WIDTH

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class AggregationInputs:
    """The arguments of `reimplementation.ops.deformable_aggregation_function`, in its order."""

    feature_maps: Tensor
    spatial_shape: Tensor
    scale_start_index: Tensor
    sampling_location: Tensor
    weights: Tensor

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    @property
    def num_visible(self) -> int:
        """How many (point, camera) pairs lie in the open unit square."""
        return int(((self.sampling_location > 0) & (self.sampling_location < 1)).all(-1).sum())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> AggregationInputs:
        """Features and weights in ``dtype``, locations in float32 or wider, everything on ``device``."""
        location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return AggregationInputs(
            self.feature_maps.to(device, dtype),
            self.spatial_shape.to(device),
            self.scale_start_index.to(device),
            self.sampling_location.to(device, location_dtype),
            self.weights.to(device, dtype),
        )


def aggregation_inputs(
    geometry: str = "rig",
    batch_size: int = 1,
    *,
    num_queries: int = 900,
    num_points: int = 13,
    channels: int = 256,
    num_groups: int = 8,
    strides: tuple[int, ...] = STRIDES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AggregationInputs:
    """Random features and softmax weights, sampled where a geometry says.

    Args:
        geometry: "rig", key points of random boxes around the car as six cameras see them (a point is in about 1.1
            of them); "dense", random points, each in every camera.
        batch_size, num_queries, num_points, channels, num_groups: sizes.
        strides: of the pyramid's levels, on 704 x 256 images.
        dtype: of features and weights; locations are float32, or float64 with float64.
        device: of everything; the numbers do not depend on it.
        seed: of the random generator.

    Raises:
        ValueError: no geometry has that name.
    """
    generator = torch.Generator().manual_seed(seed)
    rig = nuscenes_like_rig().scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)
    num_cams = len(rig.cameras)
    if geometry == "rig":
        location = _projected_key_points(rig, batch_size, num_queries, num_points, seed)
    elif geometry == "dense":
        location = torch.rand(batch_size, num_queries, num_points, num_cams, 2, generator=generator)
    else:
        raise ValueError(f"geometry must be 'rig' or 'dense'; got {geometry!r}")

    shapes = [(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in strides]
    spatial_shape = torch.tensor([shapes] * num_cams)
    rows = spatial_shape.prod(-1).flatten()
    scale_start_index = (rows.cumsum(0) - rows).view(num_cams, len(shapes))
    features = torch.randn(batch_size, int(rows.sum()), channels, generator=generator)
    logits = torch.randn(
        batch_size, num_queries, num_points, num_cams, len(shapes), num_groups, generator=generator
    )
    weights = logits.flatten(2, 4).softmax(2).view_as(logits)
    return AggregationInputs(features, spatial_shape, scale_start_index, location, weights).to(device, dtype)


def _projected_key_points(rig, batch_size: int, num_queries: int, num_points: int, seed: int) -> Tensor:
    """(batch_size, num_queries, num_points, num_cams, 2): random points of random boxes within 50 m, projected."""
    random = np.random.default_rng(seed)
    queries = (batch_size, num_queries, 1)
    distance = 50 * np.sqrt(random.uniform(0.005, 1, queries))  # uniform over the disc, not inside the car
    bearing, yaw = random.uniform(-np.pi, np.pi, (2, *queries))
    size = np.array([4.5, 1.9, 1.6]) * random.uniform(0.5, 1.5, (*queries, 3))
    local = random.uniform(-0.5, 0.5, (batch_size, num_queries, num_points, 3)) * size
    x = distance * np.cos(bearing) + local[..., 0] * np.cos(yaw) - local[..., 1] * np.sin(yaw)
    y = distance * np.sin(bearing) + local[..., 0] * np.sin(yaw) + local[..., 1] * np.cos(yaw)
    z = 0.8 + local[..., 2]
    pixels, _ = rig.project(np.stack([x, y, z], axis=-1))
    # Points behind a camera are divided by the least depth, as SparseDrive does: they land far outside.
    return torch.from_numpy(np.clip(pixels / rig.image_wh, -1e6, 1e6)).float()
