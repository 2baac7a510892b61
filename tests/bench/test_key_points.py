"""The benchmark's geometries: what they stand for, and that the fused op and the plain one sample the same places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reimplementation import ops
from reimplementation.bench.feature_aggregation import feature_aggregation_inputs
from reimplementation.bench.inputs import aggregation_inputs
from reimplementation.bench.key_points import GEOMETRIES, MAP_HEIGHTS, MAP_POINTS, key_points

SIZES = {"rig": (20, 13), "map": (5, 300), "planner": (8, 50), "dense": (10, 3)}  # queries and points
CAMERAS = {"rig": 1.1, "map": 1.05, "planner": 1.1, "dense": 6}  # that see a point on average, about


def locations(geometry: str) -> torch.Tensor:
    queries, points = SIZES[geometry]
    inputs = feature_aggregation_inputs(geometry, 2, num_queries=queries, num_points=points, channels=8, strides=(32,))
    assert ops.deformable_feature_aggregation(*inputs).shape == (2, queries, 8)
    return ops.project_points(inputs.key_points, inputs.projection_mat, inputs.image_wh)


@pytest.mark.parametrize("geometry", SIZES)
def test_so_many_cameras_see_a_point(geometry):
    location = locations(geometry)
    seen = ((location > 0) & (location < 1)).all(-1).sum(-1).double().mean().item()
    assert seen == pytest.approx(CAMERAS[geometry], rel=0.15)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_fused_op_samples_where_the_plain_one_does(geometry):
    queries, points = SIZES[geometry]
    plain = aggregation_inputs(geometry, 2, num_queries=queries, num_points=points, channels=8, strides=(32,))
    near = plain.sampling_location.abs() < 3
    torch.testing.assert_close(locations(geometry)[near], plain.sampling_location[near], rtol=1e-4, atol=1e-4)


def test_a_map_lies_on_the_ground():
    rig, points = key_points("map", 1, 4, 300, seed=1)
    assert len(rig.cameras) == 6
    by_height = points.reshape(4, MAP_POINTS, len(MAP_HEIGHTS), 3, 3)
    assert (by_height[..., 2] == np.array(MAP_HEIGHTS)[:, None]).all()
    line = by_height[..., :2].mean(axis=(2, 3))  # of which the points are evenly spaced, give or take what is learned
    steps = np.diff(line, axis=1)
    assert np.abs(steps - steps.mean(axis=1, keepdims=True)).max() < 2


def test_sizes_that_are_no_map():
    with pytest.raises(ValueError, match="points of a map must be a multiple of 100; got 13"):
        key_points("map", 1, 2, 13, seed=0)


def test_another_geometry():
    with pytest.raises(ValueError, match="geometry must be 'dense' or one of rig, map, planner; got 'ring'"):
        aggregation_inputs("ring")
