"""Frames in order, a slot a drive, with targets that say where everything is."""

import dataclasses

import pytest
import torch

from reimplementation.training.batches import slots_of
from reimplementation.training.synthetic_frames import HeldOutDrives, Place, SyntheticFrames, places_at, training_drives
from tests.training.tiny import MODEL, TINY


def test_slots_follow_their_drives():
    data = dataclasses.replace(TINY.data, num_drives=None, frames_per_drive=5)
    seen = [places_at(range(3), 3, data, step) for step in range(20)]
    for slot in range(3):
        places = [of_step[slot] for of_step in seen]
        for place, after in zip(places, places[1:]):
            assert after == place._replace(frame=place.frame + 1) or (place.frame, after.frame) == (4, 0)
    assert len({place.frame for place in seen[0]}) > 1  # not all at a beginning
    drives = [place.drive for of_step in seen for place in of_step if place.frame == 0]
    assert len(drives) == len(set(drives))  # always new ones


def test_drives_come_again_later():
    data = dataclasses.replace(TINY.data, num_drives=2, frames_per_drive=2)
    frames = training_drives(data, MODEL, "cpu", range(1), 1)
    assert {places_at(range(1), 1, data, step)[0].drive for step in range(8)} == {0, 1}
    times = [frames.at(step).metas["timestamp"].item() for step in range(8)]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert gaps[::2] == [0.5] * 4 and all(abs(gap) > 2 for gap in gaps[1::2])


def test_processes_share_the_slots():
    assert [*slots_of(0, 2, 6), *slots_of(1, 2, 6)] == list(range(6))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 processes; got 6"):
        slots_of(0, 4, 6)


def test_other_processes_work_out_the_same():
    here, there = (
        training_drives(dataclasses.replace(TINY.data, num_workers=count), MODEL, "cpu", range(2), 2)
        for count in (0, 1)
    )
    for step in (0, 1, 5):  # the last one anew
        ours, theirs = here.at(step), there.at(step)
        assert torch.equal(ours.images, theirs.images)
        assert all(torch.equal(a, b) for a, b in zip(ours.targets["boxes_3d"], theirs.targets["boxes_3d"]))


def test_targets():
    frames = SyntheticFrames(TINY.data, MODEL, "cpu", lambda step: [Place(0, 0), Place(2, 1)])
    batch = frames.at(0)
    assert batch.images.shape == (2, 6, 3, 32, 64) and batch.pictures.dtype == torch.uint8
    assert [depth.shape for depth in batch.targets["depth"]] == [(2, 6, 8, 16), (2, 6, 4, 8)]
    for boxes, labels, ids in zip(*(batch.targets[name] for name in ("boxes_3d", "labels_3d", "instance_id"))):
        assert boxes.shape == (len(labels), 9) and len(ids) == len(labels) > 5
        assert (boxes[:, :2].norm(dim=1) < MODEL.det.max_distance).all()
    for lines, labels in zip(batch.targets["map_lines"], batch.targets["map_labels"]):
        assert lines.shape == (len(labels), MODEL.map.num_points, 2)


def test_classes_of_the_model_alone():
    few = dataclasses.replace(MODEL.det, classes=("barrier", "pedestrian", "traffic_cone"))
    all_labels, few_labels = (
        SyntheticFrames(TINY.data, dataclasses.replace(MODEL, det=det), "cpu", lambda step: [Place(0, 0)])
        .at(0)
        .targets["labels_3d"][0]
        for det in (MODEL.det, few)
    )
    expected = [few.classes.index(name) for x in all_labels if (name := MODEL.det.classes[x]) in few.classes]
    assert few_labels.tolist() == expected and set(expected) > {1}


def test_held_out_drives_are_others():
    learnt = training_drives(TINY.data, MODEL, "cpu", range(1), 1).at(0)
    held_out, counts = HeldOutDrives(TINY.data, MODEL, "cpu").at(0)
    assert counts.all() and not torch.equal(learnt.metas["T_global"], held_out.metas["T_global"])
    by_heart, _ = HeldOutDrives(dataclasses.replace(TINY.data, validate_on_learnt=True), MODEL, "cpu").at(0)
    assert torch.equal(learnt.metas["T_global"], by_heart.metas["T_global"])


def test_another_number_of_cameras():
    with pytest.raises(ValueError, match="have 6 cameras; the model has 2"):
        SyntheticFrames(TINY.data, dataclasses.replace(MODEL, num_cams=2), "cpu", lambda step: [])
