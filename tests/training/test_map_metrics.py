"""The metric of map lines: cases computed by hand, and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reimplementation.training.map_metrics import (
    EvalLines,
    average_precision,
    chamfer_distance,
    evaluate_lines,
    resample,
)

CLASSES = ("ped_crossing", "divider")


def lines(offsets, sample=None, label=None, score=None) -> EvalLines:
    """Lines along y, 20 m long, at these x."""
    count = len(offsets)
    along = np.linspace(-10, 10, 5)
    points = np.stack([np.stack([np.full(5, float(x)), along], axis=1) for x in offsets]).reshape(count, 5, 2)
    zeros = np.zeros(count, dtype=int)
    return EvalLines(
        zeros if sample is None else np.array(sample),
        zeros if label is None else np.array(label),
        points,
        np.ones(count) if score is None else np.array(score, dtype=float),
    )


def test_chamfer_of_parallel_lines():
    truth = resample(lines([0, 3]).points, 50)
    assert chamfer_distance(truth, truth).diagonal() == pytest.approx([0, 0])
    assert chamfer_distance(truth[:1], truth[1:]).item() == pytest.approx(3)


def test_chamfer_of_a_part():
    """Half of a line lies on it; the other way the missing 10 m are 5 m away on average, over half of the points."""
    whole, half = np.array([[[0.0, 0], [0, 20]]]), np.array([[[0.0, 0], [0, 10]]])
    distance = chamfer_distance(resample(whole, 2000), resample(half, 2000)).item()
    assert distance == pytest.approx((5 / 2 + 0) / 2, abs=0.02)


def test_resample_keeps_ends_and_spacing():
    bent = np.array([[[0.0, 0], [1, 0], [1, 3]]])
    (points,) = resample(bent, 5)
    assert points.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert (resample(np.zeros((1, 4, 2)), 3) == 0).all()  # a line that is a point


def test_average_precision_by_hand():
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([False, True, True]), 4) == pytest.approx(2 * (2 / 3) / 4)
    assert average_precision(np.array([True]), 0) == 0 == average_precision(np.zeros(3, dtype=bool), 3)


def test_thresholds():
    metrics = evaluate_lines(lines([0, 5]), lines([0.7, 5.3]), ["divider"])
    assert metrics.average_precision["divider"] == {0.5: pytest.approx(0.25), 1.0: 1, 1.5: 1}
    assert metrics.mean_average_precision == pytest.approx(2.25 / 3)


def test_samples_and_classes_are_apart():
    truth = lines([0, 0], sample=[0, 1], label=[0, 1])
    assert evaluate_lines(truth, truth, CLASSES).mean_average_precision == 1
    swapped = lines([0, 0], sample=[1, 0], label=[0, 1])
    assert evaluate_lines(truth, swapped, CLASSES).mean_average_precision == 0


def test_a_line_is_found_once():
    found = lines([0, 0.1, 5], score=[0.9, 0.8, 0.7])
    metrics = evaluate_lines(lines([0, 5]), found, ["divider"])
    assert metrics.average_precision["divider"][1.0] == pytest.approx((1 + 2 / 3) / 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_properties(seed):
    rng = np.random.default_rng(seed)
    truth = lines(rng.uniform(-9, 9, 4), rng.integers(2, size=4), rng.integers(2, size=4))
    found = lines(rng.uniform(-9, 9, 7), rng.integers(2, size=7), rng.integers(2, size=7), rng.permutation(7))
    metrics = evaluate_lines(truth, found, CLASSES)
    for by_distance in metrics.average_precision.values():
        assert 0 <= by_distance[0.5] and by_distance[1.5] <= 1
    reverse = EvalLines(found.sample, found.label, found.points[:, ::-1], found.score)
    again = evaluate_lines(truth, reverse[rng.permutation(7)], CLASSES)
    for name in CLASSES:
        assert again.average_precision[name] == pytest.approx(metrics.average_precision[name])


def test_lines_are_checked():
    with pytest.raises(ValueError, match=r"points must be \(1, num_points, 2\)"):
        EvalLines(np.zeros(1), np.zeros(1), np.zeros((1, 4, 3)), np.zeros(1))
    with pytest.raises(ValueError, match="must be finite"):
        lines([np.nan])
