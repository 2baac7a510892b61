"""Frames out of files, as `make-dataset` writes them: in order, once a lap, with the targets of what was drawn."""

import collections
import dataclasses

import numpy as np
import pytest
import torch

from reimplementation.cli import main
from reimplementation.training.augmentation import AugmentationConfig, Seen
from reimplementation.training.config import DataConfig
from reimplementation.training.file_frames import FileTraining, FrameReader, HeldOutFiles, depth_maps
from reimplementation.training.loop import Training
from reimplementation.training.recordings import Recordings
from tests.training.tiny import ALONE, MODEL, TINY, numbers

pytest.importorskip("PIL")
pytest.importorskip("scipy")
BOXES_ALONE = dataclasses.replace(MODEL, map=None)
DATA = DataConfig(image_wh=(64, 32), num_workers=0, scene_parts=1, augmentation=None)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("rich")
    folder = tmp_path_factory.mktemp("data") / "drives"
    sizes = ["--width", "96", "--height", "48"]
    assert main(["make-dataset", str(folder), "--drives", "2", "--frames", "4", *sizes]) == 0
    return folder


def reader(folder, **changes) -> FrameReader:
    return FrameReader(Recordings(folder), dataclasses.replace(DATA, **changes), BOXES_ALONE, seed=0)


def training(folder, batch_size: int = 2, **changes) -> FileTraining:
    return FileTraining(reader(folder, **changes), range(batch_size), batch_size, CPU)


@pytest.mark.parametrize(("parts", "batch_size"), [(1, 2), (2, 2), (2, 4)])
def test_every_frame_comes_once_a_lap_and_in_order(folder, parts, batch_size):
    frames = training(folder, batch_size, scene_parts=parts)
    tokens = [token for scene in Recordings(folder).scenes.values() for token in scene]
    assert len({frames.places(0)[slot].token for slot in range(batch_size)}) == batch_size  # at different places
    for slot in range(batch_size):
        walk = [frames.places(step)[slot] for step in range(40)]
        for lap in range(1, 4):
            seen = collections.Counter(place.token for place in walk if place.lap == lap)
            assert seen == collections.Counter(tokens)
        for place, after in zip(walk, walk[1:]):
            if (place.sequence, place.lap) == (after.sequence, after.lap):
                assert tokens.index(after.token) == tokens.index(place.token) + 1
    assert len({place.sequence for place in walk}) == 2 * parts


def test_processes_share_the_slots(folder):
    both = FileTraining(reader(folder), range(2), 2, CPU).places(3)
    assert both == [FileTraining(reader(folder), range(i, i + 1), 2, CPU).places(3)[0] for i in range(2)]


def test_targets_are_the_keyframe_s(folder):
    frames = training(folder)
    batch = frames.at(1)
    for place, labels, boxes, matrix, picture in zip(
        frames.places(1),
        batch.targets["labels_3d"],
        batch.targets["boxes_3d"],
        batch.metas["projection_mat"],
        batch.pictures,
    ):
        keyframe = Recordings(folder).keyframe(place.token)
        near = np.linalg.norm(keyframe.boxes[:, :2], axis=1) < MODEL.det.max_distance
        assert np.array_equal(labels, keyframe.labels[near]) and len(labels) > 5
        assert torch.equal(boxes.nan_to_num(), torch.from_numpy(keyframe.boxes[near]).float().nan_to_num())
        scaled = keyframe.rig.scaled_to(64, 32)
        assert matrix.numpy() == pytest.approx(scaled.projection_mat, rel=1e-5, abs=1e-3)
        assert np.array_equal(picture, np.stack([camera.image for camera in scaled.cameras]))
    assert batch.images.shape == (2, 6, 3, 32, 64) and batch.metas["timestamp"].dtype == torch.float64
    assert [depth.shape for depth in batch.targets["depth"]] == [(2, 6, 8, 16), (2, 6, 4, 8)]


def test_other_processes_read_the_same(folder):
    augmentation = AugmentationConfig(grid_mask=0.5)
    here, there = (training(folder, augmentation=augmentation, num_workers=count) for count in (0, 1))
    for step in (0, 1, 2, 7):  # the last one anew
        ours, theirs = here.at(step), there.at(step)
        assert torch.equal(ours.images, theirs.images)
        assert all(torch.equal(ours.metas[name], theirs.metas[name]) for name in ours.metas)


def test_a_sequence_is_changed_alike(folder):
    """From frame to frame the cameras stay where they are; another lap changes them otherwise, and later."""
    frames = training(folder, 1, augmentation=AugmentationConfig())
    plain = training(folder, 1)
    relative = []
    for step in (0, 1, 6, 7, 8, 9):
        (place,) = frames.places(step)
        changed, unchanged = (source.at(step).metas["projection_mat"][0, 0].double() for source in (frames, plain))
        relative.append((place.lap, place.sequence, torch.linalg.solve(unchanged, changed, left=False)))
        assert not torch.allclose(changed, unchanged, rtol=1e-3)
    for lap, sequence, ours in relative:
        for other_lap, other_sequence, theirs in relative:
            is_alike = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-2)
            assert is_alike == ((lap, sequence) == (other_lap, other_sequence))
    assert frames.at(8).metas["timestamp"] > frames.at(7).metas["timestamp"] + 2


def test_stopped_and_gone_on_with(folder, tmp_path):
    data = dataclasses.replace(DATA, augmentation=AugmentationConfig())
    config = dataclasses.replace(TINY, num_steps=2, model=BOXES_ALONE, data=data)
    Training(config, tmp_path / "whole", ALONE, folder).run(lambda row: None, lambda: False)
    first = Training(config, tmp_path / "parts", ALONE, folder)
    first.run(lambda row: None, lambda: True)
    Training(config, tmp_path / "parts", ALONE, folder).run(lambda row: None, lambda: False)
    assert len(numbers(tmp_path / "parts")) == 2 and numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_held_out_scenes(folder):
    """Each frame of the chosen scenes counts once, whatever is seen side by side."""
    held_out = HeldOutFiles(reader(folder), CPU, num_slots=2)
    assert (held_out.num_slots, held_out.num_batches) == (2, 4)
    one_by_one = HeldOutFiles(reader(folder), CPU, num_slots=1)
    assert (one_by_one.num_slots, one_by_one.num_batches) == (1, 8)
    named = reader(folder, validation_scenes=("scene-0001",))
    assert HeldOutFiles(named, CPU).num_slots == 1
    learnt = {place.token for step in range(9) for place in FileTraining(named, range(1), 1, CPU).places(step)}
    assert learnt == set(Recordings(folder).scenes["scene-0000"])
    uneven = HeldOutFiles(reader(folder), CPU, num_slots=2)
    uneven._lines[1] = uneven._lines[1][:3]
    counted = [uneven.at(number)[1].tolist() for number in range(4)]
    assert counted == [[True, True]] * 3 + [[True, False]]


def test_depth_maps():
    """Of two points behind one another the nearer counts; what is behind the camera, outside or too far does not."""
    projection = np.diag([10.0, 10, 1, 1])[None]
    projection[0, :2, 2] = (32, 16)
    seen = Seen(np.zeros((1, 32, 64, 3), dtype=np.uint8), projection, np.array([10.0]))
    points = np.array([[0, 0, 5.0], [0, 0, 9], [1, 1, 2], [0, 0, -3], [100, 0, 1], [0, 0, 80]])
    fine, coarse = depth_maps(points, seen, 2, 60.0)
    assert fine.shape == (1, 8, 16) and coarse.shape == (1, 4, 8)
    assert {tuple(place): fine[tuple(place)] for place in np.argwhere(fine)} == {(0, 4, 8): 5.0, (0, 5, 9): 2.0}
    assert {tuple(place): coarse[tuple(place)] for place in np.argwhere(coarse)} == {(0, 2, 4): 2.0}


def test_clouds_of_points(folder):
    recordings = Recordings(folder)
    token = recordings.scenes["scene-0000"][0]
    assert recordings.points(token).shape == (0, 3)
    (path,) = (folder / "samples" / "LIDAR_TOP").glob("scene-0000*1500000000000000.pcd.bin")
    np.arange(10, dtype=np.float32).tofile(path)
    assert recordings.points(token).tolist() == [[0, 1, 2], [5, 6, 7]]
    np.arange(7, dtype=np.float32).tofile(path)
    with pytest.raises(ValueError, match="must hold 5 numbers a point; got 7 numbers"):
        recordings.points(token)
    path.write_bytes(b"")


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="must hold sample.json, or one folder v1.0-… of tables; it has neither"):
        Recordings(tmp_path)
    with pytest.raises(ValueError, match="the files hold no map lines: set the model's map to null"):
        FileTraining(FrameReader(Recordings(folder), DATA, MODEL, 0), range(1), 1, CPU)
    with pytest.raises(ValueError, match="has no scene to learn from beside validation_scenes"):
        training(folder, validation_scenes=("scene-0000", "scene-0001"))
    with pytest.raises(ValueError, match="has no scene scene-9"):
        HeldOutFiles(reader(folder, validation_scenes=("scene-9",)), CPU)
