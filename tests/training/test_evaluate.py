"""The metrics of boxes: cases computed by hand, properties, and nuscenes-devkit where it is."""

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reimplementation.training.evaluate import (
    DISTANCES,
    ERRORS,
    NOT_MEASURED,
    EvalBoxes,
    class_curves,
    evaluate_detections,
    true_positive_errors,
    within_class_range,
)
from tests.training.made_boxes import boxes, random_boxes

CLASSES = ("car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle")
CLASSES += ("traffic_cone", "barrier")
DEVKIT = "NUSCENES_DEVKIT_PYTHON"  # a Python that has nuscenes-devkit, and with it an older NumPy
seeds = st.integers(0, 10_000)


def test_perfect():
    truth, _ = random_boxes(0)
    truth = dataclasses.replace(truth, attribute=np.zeros(len(truth)), velocity=np.zeros((len(truth), 2)))
    metrics = evaluate_detections(truth, truth, CLASSES)
    assert metrics.mean_average_precision == pytest.approx(1)
    assert metrics.mean_errors == dict.fromkeys(ERRORS, 0)
    assert metrics.nd_score == pytest.approx(1)


def test_nothing_found():
    truth, _ = random_boxes(0)
    metrics = evaluate_detections(truth, EvalBoxes.empty(), CLASSES)
    assert (metrics.mean_average_precision, metrics.nd_score) == (0, 0)
    assert set(metrics.mean_errors.values()) == {1}
    assert evaluate_detections(EvalBoxes.empty(), truth, CLASSES).nd_score == 0


def test_average_precision_by_hand():
    """Two cars; right, wrong, right: precision 1 up to half the recall, then a line from 1/2 to 2/3."""
    truth = boxes([0, 0], [0, 0], [[0, 0], [10, 0]])
    found = boxes([0, 0, 0], [0, 0, 0], [[0, 0], [50, 0], [10, 0]], score=[0.9, 0.8, 0.7])
    recall = np.linspace(0, 1, 101)
    # At the recall 0.5 there are two precisions, 1 and then 1/2: the interpolation takes the later one.
    precision = np.where(recall < 0.5, 1, 1 / 2 + (2 / 3 - 1 / 2) * (recall - 0.5) / 0.5)
    expected = (precision[11:] - 0.1).mean() / 0.9
    for distance, curve in class_curves(truth, found, "car").items():
        assert curve.average_precision == pytest.approx(expected), distance


def test_each_distance_has_matches_of_its_own():
    """The better of two detections is 1.5 m away: at 1 m it is wrong, and at 2 m the other one is."""
    truth = boxes([0], [0], [[0, 0]])
    found = boxes([0, 0], [0, 0], [[1.5, 0], [0.2, 0]], score=[0.9, 0.5])
    precision = {d: c.precision[-1] for d, c in class_curves(truth, found, "car").items()}
    assert precision == {0.5: 0.5, 1.0: 0.5, 2.0: 0.5, 4.0: 0.5}  # the last of equal recalls counts
    curves = class_curves(truth, found, "car")
    assert curves[0.5].confidence[-1] == 0.5 and curves[2.0].errors["trans"][-1] == pytest.approx(1.5)
    assert curves[1.0].errors["trans"][-1] == pytest.approx(0.2)


def test_the_threshold_itself_is_too_far():
    truth = boxes([0], [0], [[0, 0]])
    found = boxes([0], [0], [[0, 2.0]])
    right = [d for d, curve in class_curves(truth, found, "car").items() if curve.average_precision > 0]
    assert right == [4.0]


def test_a_box_is_found_once_and_in_its_own_sample():
    truth = boxes([0, 1], [0, 0], [[0, 0], [5, 5]])
    found = boxes([0, 0, 0], [0, 0, 0], [[0, 0], [0.1, 0], [5, 5]], score=[0.9, 0.8, 0.7])
    curve = class_curves(truth, found, "car")[2.0]
    assert curve.precision[50] == pytest.approx(1 / 3) and curve.precision[51] == 0


def test_errors_by_hand():
    truth = boxes([0], [0], [[0, 0, 0]], size=[[4, 2, 2]], yaw=[3.0], velocity=[[3, 4]], attribute=[1])
    found = boxes([0], [0], [[0.6, 0.8, 9]], size=[[2, 2, 2]], yaw=[-3.0], attribute=[2])
    errors = {name: value.item() for name, value in true_positive_errors(truth, found, "car").items()}
    assert errors["trans"] == pytest.approx(1)  # seen from above
    assert errors["scale"] == pytest.approx(0.5)
    assert errors["orient"] == pytest.approx(2 * math.pi - 6)
    assert (errors["vel"], errors["attr"]) == (5, 1)
    turned = dataclasses.replace(found, yaw=truth.yaw + math.pi)
    assert true_positive_errors(truth, turned, "barrier")["orient"].item() == pytest.approx(0, abs=1e-12)
    assert true_positive_errors(truth, turned, "car")["orient"].item() == pytest.approx(math.pi)


def test_errors_that_do_not_exist():
    truth, found = random_boxes(1)
    metrics = evaluate_detections(truth, found, CLASSES)
    missing = {(name, error) for name in CLASSES for error in ERRORS if math.isnan(metrics.errors[name][error])}
    assert missing == {(name, error) for name, errors in NOT_MEASURED.items() for error in errors}
    document = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert document["classes"]["barrier"]["errors"]["vel"] is None and document["mAP"] > 0
    only_cones = evaluate_detections(boxes([0], [0], [[0, 0]]), boxes([0], [0], [[0, 0]]), ["traffic_cone"])
    assert math.isnan(only_cones.mean_errors["vel"])


def test_unknown_attributes_and_velocities_do_not_count():
    truth = boxes([0, 0], [0, 0], [[0, 0], [9, 0]], velocity=[[np.nan, 0], [1, 0]], attribute=[-1, 0])
    found = boxes([0, 0], [0, 0], [[0, 0], [9, 0]], score=[0.9, 0.5], velocity=[[5, 0], [3, 0]], attribute=[0, 1])
    metrics = evaluate_detections(truth, found, ["car"])
    curve = metrics.curves["car"][2.0]
    assert (curve.errors["vel"][-1], curve.errors["attr"][-1]) == (2, 1)


def test_range():
    near = within_class_range(boxes([0] * 4, [0, 0, 5, 9], np.zeros((4, 2)), ego_distance=[49, 50, 41, 29]), CLASSES)
    assert near.label.tolist() == [0, 9]


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_order_does_not_matter(seed):
    truth, found = random_boxes(seed)
    rng = np.random.default_rng(seed)
    found = dataclasses.replace(found, score=rng.permutation(len(found)) / len(found))
    expected = evaluate_detections(truth, found, CLASSES).to_dict()
    shuffled = evaluate_detections(truth[rng.permutation(len(truth))], found[rng.permutation(len(found))], CLASSES)
    assert shuffled.to_dict() == expected


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_only_the_order_of_scores_matters_to_precision(seed):
    truth, found = random_boxes(seed)
    expected = evaluate_detections(truth, found, CLASSES).average_precision
    squeezed = dataclasses.replace(found, score=0.2 + found.score / 3)
    assert evaluate_detections(truth, squeezed, CLASSES).average_precision == expected


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_more_distance_never_finds_less(seed):
    truth, found = random_boxes(seed)
    metrics = evaluate_detections(truth, found, CLASSES)
    assert 0 <= metrics.mean_average_precision <= 1 and 0 <= metrics.nd_score <= 1
    for curves in metrics.curves.values():
        reached = [np.count_nonzero(curves[d].precision) for d in DISTANCES]
        assert reached == sorted(reached)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"yaw": np.zeros(3)}, r"yaw must have the shape \(2,\); got \(3,\)"),
        ({"size": np.zeros((2, 3))}, "size must be positive; got 0.0"),
        ({"center": np.full((2, 3), np.nan)}, "center must be finite"),
    ],
)
def test_boxes_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(boxes([0, 0], [0, 0], np.zeros((2, 2))), **wrong)


def test_arguments_are_checked():
    one = boxes([0], [1], [[0, 0]])
    with pytest.raises(ValueError, match=r"labels of truth must be in \[0, 1\)"):
        evaluate_detections(one, one, ["car"])
    many = boxes([0] * 501, [0] * 501, np.zeros((501, 2)))
    with pytest.raises(ValueError, match="may have 500 detections; one has 501"):
        evaluate_detections(one, many, CLASSES)


@pytest.mark.skipif(DEVKIT not in os.environ, reason=f"{DEVKIT} names no Python with nuscenes-devkit")
def test_the_devkit_says_the_same():
    for seed in range(3):
        truth, found = random_boxes(seed, num_samples=8)
        found = found[np.argsort(found.sample, kind="stable")]  # as the devkit orders equal scores
        document = {"num_samples": 8, "classes": CLASSES, "distances": DISTANCES}
        document |= {"truth": as_json(truth), "detections": as_json(found)}
        said = subprocess.run(
            [os.environ[DEVKIT], Path(__file__).with_name("devkit.py")],
            input=json.dumps(document),
            capture_output=True,
            text=True,
            check=True,
        )
        ours = evaluate_detections(truth, found, CLASSES)
        for name, theirs in json.loads(said.stdout).items():
            for distance in DISTANCES:
                expected = theirs["AP"][str(distance)]
                assert ours.average_precision[name][distance] == pytest.approx(expected, abs=1e-9), (seed, name)
            for error in set(ERRORS) - set(NOT_MEASURED.get(name, ())):
                expected = theirs["errors"][f"{error}_err"]
                assert ours.errors[name][error] == pytest.approx(expected, abs=1e-9), (seed, name, error)


def as_json(boxes: EvalBoxes) -> list[dict]:
    rows = []
    for row in range(len(boxes)):
        box = {f.name: getattr(boxes, f.name)[row].tolist() for f in dataclasses.fields(boxes)}
        box["velocity"] = [None if math.isnan(v) else v for v in box["velocity"]]
        rows.append(box | {"name": CLASSES[box["label"]]})
    return rows
