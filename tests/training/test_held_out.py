"""Held-out drives are driven and judged."""

import dataclasses

import numpy as np
import pytest
import torch

from reimplementation.models.sparsedrive import SparseDrive
from reimplementation.training.held_out import ATTRIBUTES, attributes, judge, moments
from reimplementation.training.synthetic_frames import HeldOutDrives
from tests.training.tiny import MODEL, TINY


@pytest.fixture(scope="module")
def driven():
    torch.manual_seed(0)
    frames = HeldOutDrives(dataclasses.replace(TINY.data, num_validation_drives=2), MODEL, "cpu")
    return list(moments(SparseDrive(MODEL), frames, torch.device("cpu")))


def test_the_truth_is_perfect(driven):
    evaluation = judge([judged._replace(found=judged.truth) for judged in driven], MODEL)
    labels = {MODEL.det.classes[label] for judged in driven for sample in judged.truth for label in sample["labels_3d"]}
    assert set(evaluation.present) <= labels and evaluation.average_precision_of_present(2.0) == pytest.approx(1)
    for name, by_distance in evaluation.boxes.average_precision.items():
        expected = [0.0, 1.0] if name not in labels else [1.0]  # a class may be out of its range
        assert all(min(abs(value - e) for e in expected) < 1e-9 for value in by_distance.values())
    assert evaluation.boxes.average_precision["car"][0.5] == pytest.approx(1)
    assert evaluation.boxes.errors["car"]["attr"] == 0
    assert evaluation.lines.average_precision["divider"][0.5] == 1


def test_an_untrained_detector_is_not(driven):
    assert len(driven) == 3 and all(len(judged.truth) == len(judged.found) == 2 for judged in driven)
    evaluation = judge(driven, MODEL)
    assert evaluation.boxes.mean_average_precision < 0.05
    assert set(evaluation.to_dict()) == {"boxes", "lines", "present", "AP_of_present"}


def test_attributes():
    classes = ("car", "bicycle", "bus", "pedestrian", "barrier")
    label = np.array([0, 0, 1, 2, 3, 4])
    velocity = np.array([[3.0, 0], [0.1, 0], [0, 2], [0, 0], [0, 0], [5, 5]])
    names = [ATTRIBUTES[a] if a >= 0 else None for a in attributes(label, velocity, classes)]
    assert names == [
        "vehicle.moving",
        "vehicle.parked",
        "cycle.with_rider",
        "vehicle.stopped",
        "pedestrian.standing",
        None,
    ]
