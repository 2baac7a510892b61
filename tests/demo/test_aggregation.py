"""The demo of deformable aggregation: the colours that it recovers, and its picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from reimplementation.bench.inputs import STRIDES
from reimplementation.data.rig import Box, Rig
from reimplementation.data.scene import trace_boxes
from reimplementation.demo.aggregation import color_errors, look_around
from reimplementation.demo.aggregation_drawing import draw
from reimplementation.demo.recovery import color_pyramid, recover_colors


@pytest.fixture(scope="module")
def street():
    surroundings = look_around()
    return surroundings, recover_colors(surroundings.rig, surroundings.views)


def test_recovered_colors_match_the_painted_ones(street):
    surroundings, recovery = street
    errors = color_errors(recovery.colors, surroundings.painted)
    assert recovery.counted.sum() >= 25
    assert errors[recovery.counted].mean() <= 2
    assert errors[recovery.counted].max() <= 2  # and not only on average


def test_counted_boxes_are_those_in_plain_sight(street):
    """Every box whose key points are all seen in a view at least 16 pixels wide counts; no other does."""
    surroundings, recovery = street
    for i in range(len(surroundings.rig.boxes)):
        plain = False
        for camera, view in enumerate(surroundings.views):
            rows, columns = np.nonzero(view.box_ids == i)
            if recovery.seen[i, :, camera].all():
                plain |= min(np.ptp(rows), np.ptp(columns)) + 1 >= 16
        assert recovery.counted[i] == plain


def test_colors_come_from_the_op(street):
    """Paint a box anew and its recovered colour follows, while no other does."""
    surroundings, recovery = street
    index = int(np.flatnonzero(recovery.counted)[0])
    for camera, view in zip(surroundings.rig.cameras, surroundings.views, strict=True):
        camera.image[view.box_ids == index] = 255 - camera.image[view.box_ids == index]
    try:
        again = recover_colors(surroundings.rig, surroundings.views)
    finally:
        for camera, view in zip(surroundings.rig.cameras, surroundings.views, strict=True):
            camera.image[view.box_ids == index] = 255 - camera.image[view.box_ids == index]
    np.testing.assert_allclose(again.colors[index], 255 - surroundings.painted[index].astype(float), atol=2)
    others = recovery.counted & (np.arange(len(recovery.counted)) != index)
    np.testing.assert_allclose(again.colors[others], recovery.colors[others], atol=1e-3)


def test_weights(street):
    surroundings, recovery = street
    sums = recovery.weights.sum(axis=(1, 2))
    seen = recovery.seen.any(axis=(1, 2))
    np.testing.assert_allclose(sums, seen.astype(float), atol=1e-12)
    assert not (recovery.weights > 0)[~recovery.seen].any()
    np.testing.assert_array_equal(np.isnan(recovery.colors).any(axis=1), ~seen)


def test_color_pyramid_averages():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    levels = color_pyramid(images)
    assert [tuple(level.shape) for level in levels] == [(1, 2, 3, 64 // s, 96 // s) for s in STRIDES]
    expected = images[1, 32:64, 64:96, 2].mean() / 255
    assert levels[3][0, 1, 2, 1, 2].item() == pytest.approx(expected, rel=1e-5)


def test_drawing_survives_odd_rigs(tmp_path, street):
    """No box at all; one camera; a label that reads like mathematics."""
    rig = street[0].rig
    label = "$\\frac{" + "x" * 50
    for boxes in (
        (),
        (replace(rig.boxes[0], label=label),),
        tuple([Box([0, 9, 1], [1, 1, 1], 0.0, "car")] * 150),
    ):
        odd = Rig(rig.cameras[:1], boxes)
        views = [trace_boxes(camera, odd.boxes) for camera in odd.cameras]
        draw(tmp_path / "odd.png", odd, views, recover_colors(odd, views))
