"""What `make-dataset` writes in nuScenes' layout is read back as it was, by this package and by nuScenes' own."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from reimplementation.cli import main
from reimplementation.data.nuscenes import CAMERAS, CLASS_OF_CATEGORY, NuScenes
from reimplementation.data.quaternions import from_matrix, to_matrix
from reimplementation.data.rendering import render
from reimplementation.data.synthetic import CLASSES, Drive, synthetic_rig

pytest.importorskip("PIL")
pytest.importorskip("rich")
DEVKIT = "NUSCENES_DEVKIT_PYTHON"  # a Python that has nuscenes-devkit, and with it an older NumPy
RIG = synthetic_rig(96, 48)
NUM_FRAMES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drives"
    sizes = ["--width", "96", "--height", "48"]
    assert main(["make-dataset", str(folder), "--drives", "2", "--frames", str(NUM_FRAMES), *sizes]) == 0
    return folder


@pytest.fixture(scope="module")
def nuscenes(folder) -> NuScenes:
    return NuScenes(folder)


def test_scenes(nuscenes):
    assert {name: len(tokens) for name, tokens in nuscenes.scenes.items()} == {"scene-0000": 3, "scene-0001": 3}


@pytest.mark.parametrize("frame", range(NUM_FRAMES))
def test_a_frame_comes_back(nuscenes, frame):
    keyframe = nuscenes.keyframe(nuscenes.scenes["scene-0001"][frame])
    moment = Drive(1, num_frames=NUM_FRAMES).moment(frame)
    rendering = render([moment], RIG)
    seen = rendering.num_points[0].numpy() > 0
    assert keyframe.timestamp == moment.timestamp
    assert keyframe.T_global == pytest.approx(moment.T_global, abs=1e-9)
    assert len(keyframe.boxes) == seen.sum()
    ours = np.lexsort(keyframe.boxes[:, :3].round(6).T)
    theirs = np.lexsort(moment.objects.center[seen].round(6).T)
    boxes, labels = keyframe.boxes[ours], keyframe.labels[ours]
    label, _, center, size, yaw, velocity, _ = (values[seen][theirs] for values in moment.objects)
    assert np.array_equal(labels, label)
    assert boxes[:, :3] == pytest.approx(center, abs=1e-6) and boxes[:, 3:6] == pytest.approx(size)
    assert np.cos(boxes[:, 6] - yaw) == pytest.approx(1)
    known = np.isfinite(boxes[:, 7])
    assert known.mean() > 0.8
    assert boxes[known, 7:] == pytest.approx(velocity[known], abs=0.7)  # a chord of a bend, over a second
    assert [camera.name for camera in keyframe.rig.cameras] == list(CAMERAS)
    assert keyframe.rig.projection_mat == pytest.approx(RIG.projection_mat, abs=1e-6)
    images = np.stack([camera.image for camera in keyframe.rig.cameras])
    assert abs(images.astype(int) - rendering.images[0].numpy()).mean() < 6  # JPEG


def test_ids_stay(nuscenes):
    frames = [nuscenes.keyframe(token, with_images=False) for token in nuscenes.scenes["scene-0000"]]
    shared = set(frames[0].instance_id) & set(frames[2].instance_id)
    assert len(shared) > 10 and frames[0].rig.cameras[0].image is None
    for number in shared:
        labels = {int(frame.labels[frame.instance_id == number].item()) for frame in frames[::2]}
        assert len(labels) == 1


def test_categories():
    assert set(CLASS_OF_CATEGORY.values()) == set(CLASSES)


def test_quaternions():
    random = np.random.default_rng(0)
    for quaternion in [*random.normal(size=(20, 4)), *np.eye(4)]:
        matrix = to_matrix(quaternion)
        assert matrix @ matrix.T == pytest.approx(np.eye(3)) and np.linalg.det(matrix) == pytest.approx(1)
        assert to_matrix(from_matrix(matrix)) == pytest.approx(matrix)
    quarter = math.sqrt(0.5)
    assert to_matrix(np.array([quarter, 0, 0, quarter])) @ [1, 0, 0] == pytest.approx([0, 1, 0])


def test_errors(folder, tmp_path, nuscenes, capsys):
    with pytest.raises(ValueError, match="holds no tables of the version v1.0-mini"):
        NuScenes(tmp_path)
    with pytest.raises(ValueError, match="has no sample 'nothing'"):
        nuscenes.keyframe("nothing")
    assert main(["make-dataset", str(folder)]) == 2
    assert "holds a data set already" in capsys.readouterr().err
    tables = tmp_path / "v1.0-mini"
    tables.mkdir()
    (tables / "category.json").write_text('[{"token": "a"}]')
    with pytest.raises(ValueError, match=r"category.json: record 0: missing name"):
        NuScenes(tmp_path)
    (tables / "category.json").write_text("[")
    with pytest.raises(ValueError, match="category.json is not valid JSON"):
        NuScenes(tmp_path)


@pytest.mark.skipif(DEVKIT not in os.environ, reason=f"{DEVKIT} names no Python with nuscenes-devkit")
def test_the_devkit_reads_the_same(folder, nuscenes):
    program = Path(__file__).with_name("devkit_tables.py")
    said = subprocess.run([os.environ[DEVKIT], program, folder], capture_output=True, text=True, check=True)
    for token, theirs in json.loads(said.stdout).items():
        keyframe = nuscenes.keyframe(token, with_images=False)
        assert len(theirs) == len(keyframe.boxes) > 5
        pixels, _ = keyframe.rig.project(keyframe.boxes[:, :3])
        for index, box in enumerate(theirs.values()):  # in the order of the table, as ours
            ours = keyframe.boxes[index]
            assert CLASS_OF_CATEGORY[box["name"]] == CLASSES[keyframe.labels[index]]
            assert ours[:3] == pytest.approx(box["center"], abs=1e-9)
            assert ours[[4, 3, 5]] == pytest.approx(box["wlh"])
            assert math.cos(ours[6] - box["yaw"]) == pytest.approx(1)
            velocity = keyframe.T_global[:3, :3].T @ np.nan_to_num(np.array(box["velocity"], dtype=float), nan=math.nan)
            assert ours[7:] == pytest.approx(velocity[:2], abs=1e-6, nan_ok=True)
            if box["pixel"] is not None:
                assert pixels[index, 0] == pytest.approx(box["pixel"], abs=1e-4)
