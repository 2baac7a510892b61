"""Drives through the made-up town: the same every time, lawful in their motion, and drawn where they are."""

import numpy as np
import pytest
import torch

from reimplementation.data.rendering import render
from reimplementation.data.synthetic import CLASSES, EXTENT, MAP_CLASSES, Drive, synthetic_rig
from reimplementation.models.sparsedrive import config

RIG = synthetic_rig(160, 64)


@pytest.fixture(scope="module")
def moment():
    return Drive(1).moment(10)


@pytest.fixture(scope="module")
def rendering(moment):
    return render([moment], RIG)


def test_classes_are_the_detectors():
    assert (CLASSES, MAP_CLASSES) == (config.BOX_CLASSES, config.MAP_CLASSES)


def test_a_frame_is_the_same_every_time(moment, rendering):
    """Alone or in a batch, after other frames or before."""
    drive = Drive(1)
    others = [drive.moment(3), Drive(2).moment(0)]
    again = drive.moment(10)
    for ours, theirs in zip(moment.objects, again.objects):
        assert np.array_equal(ours, theirs)
    batch = render([*others, again], RIG)
    assert torch.equal(batch.images[2], rendering.images[0])
    assert torch.equal(batch.num_points[2][: len(moment.objects.label)], rendering.num_points[0])


@pytest.mark.cuda
def test_a_frame_is_the_same_on_a_gpu(moment, rendering):
    images = render([moment], RIG, "cuda").images.cpu()
    different = (images.int() - rendering.images.int()).abs().amax(-1) > 1
    assert different.float().mean() < 1e-3  # pixels on an edge, where rounding decides


def test_drives_differ(moment):
    assert len({len(Drive(i).moment(10).objects.label) for i in range(8)}) > 4
    assert not np.array_equal(Drive(1, seed=1).moment(10).T_global, moment.T_global)


def test_all_classes_are_about():
    labels = np.concatenate([Drive(i).moment(0).objects.label for i in range(12)])
    assert set(labels) == set(range(len(CLASSES)))


@pytest.mark.parametrize("index", range(4))
def test_objects_move_as_their_velocity_says(index):
    """Over half a second an object stays within its road's bend of the straight line, in the world's frame."""
    drive = Drive(index)
    before, after = drive.moment(4), drive.moment(5)
    assert after.timestamp - before.timestamp == 0.5
    ids, here, there = np.intersect1d(before.objects.instance_id, after.objects.instance_id, return_indices=True)
    assert len(ids) > 10
    turn = before.T_global[:2, :2]
    start = before.objects.center[here, :2] @ turn.T + before.T_global[:2, 3]
    end = after.objects.center[there, :2] @ after.T_global[:2, :2].T + after.T_global[:2, 3]
    moved = before.objects.velocity[here] @ turn.T * 0.5
    speed = np.linalg.norm(before.objects.velocity[here], axis=1)
    radius = 1 / abs(before.road.bend) - 20  # of the innermost object's way
    assert (np.linalg.norm(end - start - moved, axis=1) <= (0.5 * speed) ** 2 / (2 * radius) * 1.1 + 1e-9).all()
    assert np.array_equal(before.objects.size[here], after.objects.size[there])
    heads = np.stack([np.cos(before.objects.yaw[here]), np.sin(before.objects.yaw[here])], axis=1)
    assert ((heads * before.objects.velocity[here]).sum(axis=1) > -1e-9).all()  # nothing reverses


@pytest.mark.parametrize("index", range(4))
def test_objects_do_not_overlap(index):
    """Of no object does the middle line run through another."""
    objects = Drive(index).moment(20).objects
    heads = np.stack([np.cos(objects.yaw), np.sin(objects.yaw)], axis=1)
    along = np.linspace(-0.5, 0.5, 9)[:, None, None] * (objects.size[:, :1] * heads) + objects.center[:, :2]
    for i in range(len(objects.label)):
        away = along - objects.center[i, :2]
        forward, left = away @ heads[i], away @ np.array([-heads[i, 1], heads[i, 0]])
        inside = (abs(forward) < objects.size[i, 0] / 2) & (abs(left) < objects.size[i, 1] / 2)
        inside[:, i] = False
        assert not inside.any()


def test_pixels_show_their_objects(moment, rendering):
    """The place behind a pixel, by its depth, lies on the surface of the object that the pixel is said to show."""
    checked = 0
    for view, camera in enumerate(RIG.cameras):
        ids, depth = rendering.box_ids[0, view].numpy(), rendering.depth[0, view].double().numpy()
        v, u = np.nonzero(ids >= 0)
        rays = np.stack([u + 0.5, v + 0.5, np.ones(len(u))], axis=1) @ np.linalg.inv(camera.intrinsics).T
        points = camera.position + (rays * depth[v, u, None]) @ camera.world_to_camera[:3, :3]
        box = ids[v, u]
        away = points - moment.objects.center[box]
        cos, sin = np.cos(moment.objects.yaw[box]), np.sin(moment.objects.yaw[box])
        local = np.stack([cos * away[:, 0] + sin * away[:, 1], cos * away[:, 1] - sin * away[:, 0], away[:, 2]], axis=1)
        reach = (abs(local) / (moment.objects.size[box] / 2)).max(axis=1)
        assert reach == pytest.approx(1, abs=5e-3)
        checked += len(u)
    assert checked > 1000


def test_what_is_seen_is_not_hidden(moment, rendering):
    """Most objects that fill pixels are seen by the lidar, and some are hidden from it."""
    count = len(moment.objects.label)
    points = rendering.num_points[0, :count]
    assert (points <= 27).all() and 0 < (points == 0).sum() < count / 2
    pixels = torch.bincount(rendering.box_ids[rendering.box_ids >= 0], minlength=count)
    assert (points[pixels > 30] > 0).float().mean() > 0.9


def test_lines_are_painted_where_they_are(moment, rendering):
    """The line in the middle is brighter than the asphalt 0.6 m beside it, wherever no object hides it."""
    on, beside = [], []
    s = np.linspace(-12, 12, 100)
    for offset, values in ((0.0, on), (0.6, beside)):
        points = moment.road.points(s, np.full_like(s, moment.road.dividers[0] + offset))
        pixels, depth = RIG.project(np.concatenate([points, np.full((100, 1), -1.84)], axis=1))
        for view in range(6):
            x, y = pixels[:, view].T
            seen = (depth[:, view] > 1) & (x >= 0) & (x < 160) & (y >= 0) & (y < 64)
            row, column = y[seen].astype(int), x[seen].astype(int)
            free = rendering.box_ids[0, view][row, column] < 0
            values.append(rendering.images[0, view][row, column][free].float().mean(-1))
    assert len(torch.cat(on)) > 20 and torch.cat(on).mean() > 1.5 * torch.cat(beside).mean()


@pytest.mark.parametrize("index", range(6))
def test_map_lines(index):
    moment = Drive(index).moment(7)
    assert len(moment.map_labels) == len(moment.map_lines) > 2
    for label, line in zip(moment.map_labels, moment.map_lines):
        assert (abs(line) <= np.array(EXTENT) / 2 + 4).all()
        is_closed = np.array_equal(line[0], line[-1])
        assert is_closed == (MAP_CLASSES[label] == "ped_crossing")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"frame must be in \[0, 40\); got 40"):
        Drive(0).moment(40)
    with pytest.raises(ValueError, match="must be at least 0 and num_frames 1; got -1"):
        Drive(-1)


def test_the_kernel_traces_the_same():
    """Triton's, interpreted on the CPU, beside PyTorch's operators: random rays and boxes, and a box without extent."""
    pytest.importorskip("triton")
    from reimplementation.data import rendering as drawing
    from reimplementation.data import tracing

    generator = torch.Generator().manual_seed(0)
    origin = torch.randn(1, 2, 3, generator=generator)
    direction = torch.randn(1, 2, 300, 3, generator=generator)
    center = 6 * torch.randn(1, 2, 7, 3, generator=generator)
    half = 0.5 + 2 * torch.rand(1, 2, 7, 3, generator=generator)
    half[:, :, -1] = 0
    angle = 6 * torch.rand(1, 2, 7, generator=generator)
    cos_sin = torch.stack([angle.cos(), angle.sin()], dim=-1)
    boxes = drawing._Boxes(center, half, cos_sin, torch.arange(7).expand(1, 2, 7))
    distance, nearest = drawing._trace_views(drawing._Rays(origin, direction), boxes)
    traced, which = tracing.trace(origin, direction, center, half, cos_sin, drawing.NEAR)
    assert torch.equal(which, nearest) and torch.allclose(traced, distance, rtol=1e-5)
    assert (which.unique() == torch.arange(-1, 6)).all()
