"""The built-in scene: geometry checked against projections and point-in-box tests that do not trace rays."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from reimplementation.data import scene as scene_module
from reimplementation.data.rig import Box, Camera, nuscenes_like_rig
from reimplementation.data.scene import (
    KEY_POINTS,
    built_in_scene,
    key_points,
    pixels_across,
    trace_boxes,
    visibility,
)


@pytest.fixture(scope="module")
def scene():
    return built_in_scene()


def in_box(box: Box, points: np.ndarray, margin: float) -> np.ndarray:
    """Whether points (..., 3) lie in the box, grown by a margin."""
    local = np.abs((points - box.center) @ box.rotation)
    return (local <= box.size_lwh / 2 + margin).all(axis=-1)


def points_at(camera: Camera, row: np.ndarray, column: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """World points (..., 3) at the centres of pixels, by the inverse of the projection matrix."""
    pixels = np.stack([(column + 0.5) * depth, (row + 0.5) * depth, depth, np.ones_like(depth)], axis=-1)
    return (pixels @ np.linalg.inv(camera.projection_mat).T)[..., :3]


def test_boxes_do_not_overlap_and_keep_off_the_car(scene):
    footprints = [(box.corners().min(axis=0), box.corners().max(axis=0)) for box in scene.rig.boxes]
    for (i, (low, high)), (j, (other_low, other_high)) in combinations(enumerate(footprints), 2):
        assert (high < other_low).any() or (other_high < low).any(), (i, j)
    assert all((np.abs(box.corners()[:, :2]) > (1.1, 2.5)).any(axis=1).all() for box in scene.rig.boxes)
    assert {"car", "van", "truck", "bus", "cyclist", "pedestrian"} == {box.label for box in scene.rig.boxes}


def test_colors_can_be_told_apart(scene):
    colors = scene.colors.astype(int)
    assert min(np.abs(a - b).max() for a, b in combinations(colors, 2)) >= 10


def test_every_box_is_one_flat_color(scene):
    for camera, view in zip(scene.rig.cameras, scene.views, strict=True):
        assert camera.image.shape == (256, 704, 3)
        hit = view.box_ids >= 0
        np.testing.assert_array_equal(camera.image[hit], scene.colors[view.box_ids[hit]])


def test_pixels_lie_on_the_box_they_name(scene):
    for camera, view in zip(scene.rig.cameras, scene.views, strict=True):
        for index in np.unique(view.box_ids[view.box_ids >= 0]):
            rows, columns = np.nonzero(view.box_ids == index)
            points = points_at(camera, rows, columns, view.depth[rows, columns])
            box = scene.rig.boxes[index]
            assert in_box(box, points, 1e-9).all() and not in_box(box, points, -1e-9).any()


def test_nothing_stands_before_what_is_seen(scene):
    """March along rays in steps: no step before the depth reported lies in any box."""
    random = np.random.default_rng(0)
    for camera, view in zip(scene.rig.cameras, scene.views, strict=True):
        rows, columns = random.integers(0, 256, 60), random.integers(0, 704, 60)
        depth = np.minimum(view.depth[rows, columns], 80.0)
        for step in np.linspace(0.01, 0.999, 150):
            points = points_at(camera, rows, columns, depth * step)
            assert not any(in_box(box, points, -1e-6).any() for box in scene.rig.boxes)


def test_ids_and_depth_at_projected_centers(scene):
    centers = np.array([box.center for box in scene.rig.boxes])
    pixels, center_depth = scene.rig.project(centers)
    seen = visibility(scene.rig, scene.views)[:, 0]  # the first key point is the centre
    assert seen.any(axis=1).sum() >= 25
    for box, camera in np.argwhere(seen):
        column, row = pixels[box, camera].astype(int)
        view = scene.views[camera]
        assert view.box_ids[row, column] == box
        reach = np.linalg.norm(scene.rig.boxes[box].size_lwh) / 2
        assert 0 < center_depth[box, camera] - view.depth[row, column] <= reach


def test_ground_and_sky(scene):
    camera, view = scene.rig.cameras[0], scene.views[0]
    assert view.depth[0, 0] == np.inf
    rows, columns = np.nonzero((view.box_ids < 0) & np.isfinite(view.depth))
    heights = points_at(camera, rows, columns, view.depth[rows, columns])[:, 2]
    assert len(heights) > 10_000
    np.testing.assert_allclose(heights, 0, atol=1e-9)


def test_nearer_box_hides_the_farther():
    camera = nuscenes_like_rig().scaled_to(704, 256).cameras[0]
    near, far = (Box([0, y, 1.5], [2, 2, 2], 0.0, "car") for y in (10, 20))
    for boxes, front in (((near, far), 0), ((far, near), 1)):
        view = trace_boxes(camera, boxes)
        assert set(np.unique(view.box_ids)) == {-1, front}  # the far box lies wholly behind the near one
        np.testing.assert_allclose(view.depth[view.box_ids == front].min(), 10 - 1 - camera.position[1])


def test_box_reaching_behind_the_camera():
    camera = nuscenes_like_rig().scaled_to(704, 256).cameras[0]
    beside = Box([3.0, 0.75, 1.5], [20, 2, 2], np.pi / 2, "bus")
    view = trace_boxes(camera, [beside])
    columns = np.nonzero((view.box_ids == 0).any(axis=0))[0]
    assert columns.min() > 352 and columns.max() == 703
    behind = trace_boxes(
        camera, [Box([0, -10, 1.5], [2, 2, 2], 0.0, "car"), Box(camera.position, [2, 2, 2], 0.0, "car")]
    )
    assert (behind.box_ids == -1).all()  # one is behind the camera, one holds it


def test_key_points_lie_in_their_boxes(scene):
    points = key_points(scene.rig.boxes)
    assert points.shape == (len(scene.rig.boxes), 13, 3)
    for box, own in zip(scene.rig.boxes, points, strict=True):
        assert in_box(box, own, 0).all()
        assert len(np.unique(own.round(6), axis=0)) == 13


def test_key_points_are_those_of_the_generator(scene):
    import torch

    from reimplementation.models.deformable import SparseBox3DKeyPointsGenerator

    generator = SparseBox3DKeyPointsGenerator(fix_scale=KEY_POINTS.tolist()).double()
    expected = generator(torch.from_numpy(scene.rig.anchors)[None])[0]
    np.testing.assert_allclose(key_points(scene.rig.boxes), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_pixels_across_is_the_shorter_side(scene):
    view = scene_module.View(np.full((8, 9), -1, dtype=np.int32), np.full((8, 9), np.inf))
    view.box_ids[2:5, 1:8] = 1
    np.testing.assert_array_equal(pixels_across(3, [view]), [[0], [3], [0]])


def test_no_boxes_at_all(scene):
    assert key_points(()).shape == (0, 13, 3)
    assert (trace_boxes(scene.rig.cameras[0], ()).box_ids == -1).all()
