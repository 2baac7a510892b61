"""`detect` draws what a detector finds, and says what its weights are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from reimplementation.cli import main
from reimplementation.data.rig import Box
from reimplementation.demo.detection import Detections, Line, build, detect, look_around
from tests.models.sparsedrive.small import CONFIG

pytest.importorskip("matplotlib")
pytest.importorskip("yaml")
NUSCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuscenes_sample"
SIX_CAMERAS = dataclasses.replace(CONFIG, num_cams=6)


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "small.yaml"
    SIX_CAMERAS.to_yaml(path)
    return str(path)


@pytest.mark.parametrize(
    "rig",
    [
        None,
        pytest.param(NUSCENES, marks=pytest.mark.skipif(not NUSCENES.is_dir(), reason="the sample is not here")),
    ],
    ids=["street", "nuscenes"],
)
def test_random_weights(rig, config, tmp_path, capsys):
    output = tmp_path / "detect.svg"
    where = [] if rig is None else ["--rig", str(rig)]
    assert main(["detect", *where, "--config", config, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "boxes" in said and "random weights" in said and str(output) in said
    assert output.stat().st_size > 10_000


def test_checkpoint(config, tmp_path, capsys):
    model = build(config, None, look_around(None))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    output = str(tmp_path / "detect.png")
    call = ["detect", "--config", config, "--checkpoint", str(tmp_path / "weights.pth"), "--output", output]
    assert main([*call, "--min-score", "1"]) == 0
    said = capsys.readouterr().out
    assert "no boxes and no lines that score at least 1; weights of weights.pth" in said
    assert Path(output).read_bytes().startswith(b"\x89PNG")


def test_images_matter(config):
    """What is found depends on what the cameras see, and is best first."""
    rig = look_around(None)
    model = build(config, None, rig)
    found = detect(model, rig)
    assert list(found.box_scores) == sorted(found.box_scores, reverse=True) and len(found.boxes) > 0
    assert {box.label for box in found.boxes} <= set(SIX_CAMERAS.det.classes)
    dark = dataclasses.replace(
        rig, cameras=tuple(dataclasses.replace(c, image=np.zeros_like(c.image)) for c in rig.cameras)
    )
    assert detect(model, dark).box_scores != found.box_scores


def test_best():
    boxes = tuple(Box(np.zeros(3), np.ones(3), 0.0, "car") for _ in range(3))
    line = Line(np.zeros((2, 2)), "divider")
    found = Detections(boxes, (0.9, 0.5, 0.1), (line,), (0.2,))
    best = found.best(0.3, most_boxes=5, most_lines=5)
    assert (len(best.boxes), best.box_scores, best.lines) == (2, (0.9, 0.5), ())
    best = found.best(0.0, most_boxes=1, most_lines=5)
    assert (len(best.boxes), best.lines) == (1, (line,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "nowhere/detect.png"], "must name a file in a folder that exists"),
        (["--checkpoint", "missing.pth"], "missing.pth is not a file"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["--rig", "missing"], "missing is not a folder"),
    ],
)
def test_errors_are_one_line(options, message, config, tmp_path, capsys):
    call = ["detect", "--config", config, "--output", str(tmp_path / "detect.png"), *options]
    assert main(call) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_another_number_of_cameras(tmp_path, capsys):
    CONFIG.to_yaml(tmp_path / "two.yaml")
    call = ["detect", "--config", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "detect.png")]
    assert main(call) == 2
    assert "looks through 2 cameras; the rig has 6" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2", "-0.1", "half", "nan"])
def test_scores(text, capsys):
    with pytest.raises(SystemExit):
        main(["detect", "--min-score", text])
    assert f"expected a number between 0 and 1; got '{text}'" in capsys.readouterr().err
