"""Frames in order, a slot a drive, with targets that say where everything is."""

import dataclasses

import pytest
import torch

from reimplementation.training.batches import slots_of
from reimplementation.training.synthetic_frames import SyntheticFrames, places_at
from tests.training.tiny import MODEL, TINY


def test_slots_follow_their_drives():
    data = dataclasses.replace(TINY.data, num_drives=None, frames_per_drive=5)
    seen = [places_at(step, range(3), 3, data)[0] for step in range(20)]
    for slot in range(3):
        places = [of_step[slot] for of_step in seen]
        for (drive, frame), (next_drive, next_frame) in zip(places, places[1:]):
            assert (next_drive, next_frame) == (drive, frame + 1) or (frame, next_frame) == (4, 0)
    assert len({frame for _, frame in seen[0]}) > 1  # not all at a beginning
    drives = [drive for of_step in seen for drive, frame in of_step if frame == 0]
    assert len(drives) == len(set(drives))  # always new ones


def test_drives_come_again_later():
    data = dataclasses.replace(TINY.data, num_drives=2, frames_per_drive=2)
    frames = SyntheticFrames(data, MODEL, "cpu")
    times = []
    for step in range(8):
        places, passes = places_at(step, range(1), 1, data)
        assert places[0][0] in (0, 1)
        times.append(frames.batch(places, passes).metas["timestamp"].item())
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert gaps[::2] == [0.5] * 4 and all(abs(gap) > 2 for gap in gaps[1::2])


def test_processes_share_the_slots():
    assert [*slots_of(0, 2, 6), *slots_of(1, 2, 6)] == list(range(6))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 processes; got 6"):
        slots_of(0, 4, 6)


def test_targets():
    frames = SyntheticFrames(TINY.data, MODEL, "cpu")
    batch = frames.batch([(0, 0), (2, 1)])
    assert batch.images.shape == (2, 6, 3, 32, 64) and batch.pictures.dtype == torch.uint8
    assert [depth.shape for depth in batch.targets["depth"]] == [(2, 6, 8, 16), (2, 6, 4, 8)]
    for boxes, labels, ids in zip(*(batch.targets[name] for name in ("boxes_3d", "labels_3d", "instance_id"))):
        assert boxes.shape == (len(labels), 9) and len(ids) == len(labels) > 5
        assert (boxes[:, :2].norm(dim=1) < MODEL.det.max_distance).all()
    for lines, labels in zip(batch.targets["map_lines"], batch.targets["map_labels"]):
        assert lines.shape == (len(labels), MODEL.map.num_points, 2)


def test_held_out_drives_are_others():
    train, other = (SyntheticFrames(TINY.data, MODEL, "cpu", held_out=held_out) for held_out in (False, True))
    place = [(0, 0)]
    assert not torch.equal(train.batch(place).metas["T_global"], other.batch(place).metas["T_global"])


def test_another_number_of_cameras():
    with pytest.raises(ValueError, match="have 6 cameras; the model has 2"):
        SyntheticFrames(TINY.data, dataclasses.replace(MODEL, num_cams=2), "cpu")
