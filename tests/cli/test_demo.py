"""`demo` from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from reimplementation import ops
from reimplementation.bench import modules
from reimplementation.cli import main
from reimplementation.cli.demo import print_report

NUSCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuscenes_sample"


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
    monkeypatch.setattr(modules, "cases", list)  # the module's timing does not depend on the images
    picture = tmp_path / "real.png"
    assert main(["demo", "--rig", str(NUSCENES), "--queries", "5", "--json", "--output", str(picture)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["boxes"]) == 69 and "colors" not in document
    recovered = [box["recovered_rgb"] for box in document["boxes"] if box["recovered_rgb"]]
    assert len(recovered) > 40 and 0 <= np.min(recovered) and np.max(recovered) <= 255
    assert picture.stat().st_size > 100_000


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
    expected = f"argument --queries: expected a whole number between 1 and 100000; got '{count}'\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "PIL"])
def test_missing_extra(missing, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "reimplementation.demo.aggregation_drawing", raising=False)
    monkeypatch.delitem(sys.modules, "reimplementation.demo.drawing", raising=False)
    arguments = ["demo", "--output", str(tmp_path / "demo.png")]
    if missing == "PIL":
        if not NUSCENES.is_dir():
            pytest.skip("only reading images needs Pillow, and the nuScenes sample is not here")
        arguments += ["--rig", str(NUSCENES)]
    assert "pip install 'reimplementation[demo]'" in fails(arguments, capsys)


def test_an_output_without_a_format_is_refused(tmp_path, capsys):
    for name in ("demo.doc", "demo"):
        output = str(tmp_path / name)
        assert f"--output {output} must end in one of" in fails(["demo", "--output", output], capsys)


def test_missing_kernels_of_the_gpu_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops.backends, "why_missing", lambda device: f"none for {device}. To build it: …")
    monkeypatch.setattr(modules, "cases", list)
    assert main(["demo", "--queries", "5", "--op", "msda", "--json", "--output", str(tmp_path / "demo.png")]) == 0
    said = capsys.readouterr().err
    assert "timing grid_sample alone on the GPU: no cuda kernels: none for cuda. To build it: …" in said
