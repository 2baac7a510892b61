"""`demo --rig` on a folder that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from reimplementation.bench import modules
from reimplementation.cli import main
from reimplementation.cli.demo import SHOWS


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """One camera and one box before it. The module's timing is left out: it does not depend on the images."""
    monkeypatch.setattr(modules, "cases", list)
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (256, 704, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "front.png")
    camera = {
        "name": "front",
        "image": "front.png",
        "width": 704,
        "height": 256,
        "intrinsics": [[500, 0, 352], [0, 500, 128], [0, 0, 1]],
        "lidar_to_camera": [[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
    }
    box = {"center": [1, 12, 0], "size_lwh": [4, 2, 1.5], "yaw": 0.3, "label": "car"}
    write(tmp_path, {"cameras": [camera], "boxes": [box]})
    return tmp_path


def write(folder: Path, document: dict) -> None:
    (folder / "sample.json").write_text(json.dumps(document))


def change(folder: Path, section: str, key: str, value) -> None:
    document = json.loads((folder / "sample.json").read_text())
    document[section][0][key] = value
    write(folder, document)


def run(folder: Path, op: str) -> int:
    output = folder / "picture.png"
    return main(["demo", "--op", op, "--rig", str(folder), "--queries", "5", "--output", str(output)])


@pytest.mark.parametrize("op", SHOWS)
@pytest.mark.parametrize("name", ["[/red]", "$\\frac{ :car: %s {0}"])
def test_names_are_text_and_nothing_else(folder, capsys, op, name):
    change(folder, "cameras", "name", name)
    change(folder, "boxes", "label", name)
    assert run(folder, op) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("op", SHOWS)
@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("cameras", "image", "../front.png", "neither absolute nor with"),
        ("cameras", "image", "\x1b[2J", "must be a printable path"),
        ("cameras", "width", 705, "it is 704 x 256 pixels; expected 705 x 256"),
        ("boxes", "center", [[1, 2], 3], "center must be numbers"),
    ],
)
def test_what_is_broken_is_one_line(folder, capsys, op, section, key, value, message):
    change(folder, section, key, value)
    assert run(folder, op) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err and said.err.strip().isprintable()


@pytest.mark.parametrize("op", SHOWS)
def test_a_camera_that_sees_nothing_and_a_box_far_away(folder, op):
    change(folder, "boxes", "center", [9e5, -9e5, 9e5])
    change(folder, "boxes", "size_lwh", [9e5, 1e-2, 9e5])
    change(folder, "cameras", "intrinsics", [[9e5, 0, -9e5], [0, 1e-3, 9e5], [0, 0, 1]])
    assert run(folder, op) == 0
