"""The demo: the colours it recovers, and the command from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from reimplementation import ops
from reimplementation.bench.inputs import STRIDES
from reimplementation.cli import demo, main
from reimplementation.cli.demo_tables import print_report
from reimplementation.data.rig import Box, Rig
from reimplementation.data.scene import trace_boxes
from reimplementation.demo.drawing import draw
from reimplementation.demo.recovery import color_pyramid, recover_colors

NUSCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuscenes_sample"


@pytest.fixture(scope="module")
def street():
    surroundings = demo.look_around()
    return surroundings, recover_colors(surroundings.rig, surroundings.views)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The command's JSON document and picture, from a run of its own."""
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    command = [
        sys.executable,
        "-m",
        "reimplementation",
        "demo",
        "--json",
        "--queries",
        "20",
        "--output",
        str(picture),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), picture


def test_recovered_colors_match_the_painted_ones(street):
    surroundings, recovery = street
    errors = demo.color_errors(recovery.colors, surroundings.painted)
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


def test_document(report):
    document, _ = report
    colors = document["colors"]
    assert colors["mean_absolute_error"] <= 2
    counted = [box["error"] for box in document["boxes"] if box["counted"]]
    assert len(counted) == colors["counted_boxes"]
    assert np.mean(counted) == pytest.approx(colors["mean_absolute_error"])
    assert len(document["cameras"]) == 6 and document["module"]["queries"] == 20


def test_module_runs_on_every_backend(report):
    document, _ = report
    timings = document["module"]["timings"]
    on_the_cpu = [timing["backend"] for timing in timings if timing["device"] == "cpu"]
    assert sorted(set(on_the_cpu)) == sorted(ops.available_backends("cpu"))
    bounds = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
    for timing in timings:
        assert 0 < timing["max_relative_error"] < bounds[timing["dtype"]], timing
        assert timing["forward_backward_ms"] > 0 and timing["forward_ms"] > 0


def test_picture(report):
    image = pytest.importorskip("PIL.Image")
    _, picture = report
    with image.open(picture) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[1] == 2224
    assert pixels.std() > 20 and len(np.unique(pixels @ (1, 256, 65536))) > 1000


def test_tables(report, capsys):
    document, _ = report
    print_report(document, Console())
    said = capsys.readouterr().out
    assert "Mean absolute error" in said and "pedestrian" in said and "grid_sample" in said


@pytest.mark.skipif(not NUSCENES.is_dir(), reason="the nuScenes sample is not here")
def test_real_rig(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "cases", list)  # the module's timing does not depend on the images
    picture = tmp_path / "real.png"
    assert main(["demo", "--rig", str(NUSCENES), "--queries", "5", "--json", "--output", str(picture)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["boxes"]) == 69 and "colors" not in document
    recovered = [box["recovered_rgb"] for box in document["boxes"] if box["recovered_rgb"]]
    assert len(recovered) > 40 and 0 <= np.min(recovered) and np.max(recovered) <= 255
    assert picture.stat().st_size > 100_000


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


def fails(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err


def test_errors_are_one_line(tmp_path, capsys):
    assert "is not a folder" in fails(["demo", "--rig", str(tmp_path / "nowhere")], capsys)
    (tmp_path / "sample.json").write_text('{"cameras": [{}], "boxes": []}')
    assert "cameras[0]: missing name" in fails(["demo", "--rig", str(tmp_path)], capsys)
    output = str(tmp_path / "nowhere" / "demo.png")
    assert "--output" in fails(["demo", "--output", output], capsys)
    assert "--output" in fails(["demo", "--output", str(tmp_path)], capsys)


@pytest.mark.parametrize("count", ["0", "-3", "many", "1000000000"])
def test_query_count(count, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--queries", count])
    assert stopped.value.code == 2
    assert "--queries" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "PIL"])
def test_missing_extra(missing, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "reimplementation.demo.drawing", raising=False)
    arguments = ["demo", "--output", str(tmp_path / "demo.png")]
    if missing == "PIL":
        if not NUSCENES.is_dir():
            pytest.skip("only reading images needs Pillow, and the nuScenes sample is not here")
        arguments += ["--rig", str(NUSCENES)]
    assert "pip install 'reimplementation[demo]'" in fails(arguments, capsys)
