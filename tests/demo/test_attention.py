"""The demo of multi-scale deformable attention: the colours it reads, and the command from end to end."""

from __future__ import annotations

import json
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
from reimplementation.data.rig import nuscenes_like_rig
from reimplementation.demo import attention
from reimplementation.demo.attention_drawing import draw
from reimplementation.demo.reading import GRID, NUM_HEADS, NUM_POINTS, STRIDES, color_pyramid, read_colors

NUSCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuscenes_sample"


def bilinear(level: np.ndarray, x: float, y: float) -> np.ndarray:
    """One sample of a level (3, H, W) at a pixel position whose integers are pixel centres; zero outside."""
    left, top = int(np.floor(x)), int(np.floor(y))
    color = np.zeros(3)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < level.shape[1] and 0 <= column < level.shape[2]:
            color += (1 - abs(y - row)) * (1 - abs(x - column)) * level[:, row, column]
    return color


def test_heads_read_the_mean_of_their_samples():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    reading = read_colors(image)
    levels = [level.numpy() for level in color_pyramid(image)]
    num_queries = GRID[0] * GRID[1]
    assert reading.locations.shape == (num_queries, NUM_HEADS, len(STRIDES), NUM_POINTS, 2)
    for query, head in ((0, 0), (num_queries // 2, 3), (num_queries - 1, 7)):
        samples = [
            bilinear(level, x * level.shape[2] - 0.5, y * level.shape[1] - 0.5)
            for level, points in zip(levels, reading.locations[query, head], strict=True)
            for x, y in points
        ]
        np.testing.assert_allclose(reading.colors[query, head], np.mean(samples, axis=0) * 255, atol=1e-3)
    assert reading.error < 1e-3


def test_an_even_image_comes_back():
    """Where every sample lies inside; beside the border the samples beyond it are black."""
    reading = read_colors(np.full((256, 704, 3), (200, 100, 50), dtype=np.uint8))
    inside = ((reading.locations > 0.07) & (reading.locations < 0.93)).all(axis=(2, 3, 4))
    assert inside.sum() > 10 and not inside.all()
    np.testing.assert_allclose(reading.colors[inside], [[200, 100, 50]] * inside.sum(), atol=1e-2)
    assert (reading.colors < 200.01).all()


def test_the_camera_ahead_is_chosen(monkeypatch):
    class Scene:
        rig = nuscenes_like_rig()

    monkeypatch.setattr(attention, "built_in_scene", Scene)
    assert attention.front_camera().name == "CAM_FRONT"


def test_problem_moves_without_sharing():
    problem = attention.problem(num_queries=6)
    before = torch.get_rng_state()
    again = attention.problem(num_queries=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.query, problem.query)
    double = problem.to(dtype=torch.float64)
    half = problem.to(dtype=torch.bfloat16)
    assert double.forward().dtype == torch.float64
    assert half.input_flatten.dtype == half.query.dtype == torch.float32  # autocast makes them half
    for leaf in double.leaves:
        leaf.requires_grad_()
    double.forward().sum().backward()
    assert all(leaf.grad is not None for leaf in double.leaves)
    assert all(p.grad is None for p in problem.module.parameters()) and not problem.query.requires_grad


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(modules, "SECONDS_PER_FIGURE", 0)


def test_command(tmp_path, capsys, quick):
    picture = tmp_path / "picture.png"
    arguments = ["demo", "--op", "msda", "--json", "--queries", "20", "--output", str(picture)]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["op"] == "msda" and document["camera"] == "CAM_FRONT"
    assert len(document["queries"]) == GRID[0] * GRID[1]
    assert document["colors"]["max_absolute_error"] < 1e-2
    timings = document["module"]["timings"]
    on_the_cpu = [timing["backend"] for timing in timings if timing["device"] == "cpu"]
    assert sorted(set(on_the_cpu)) == sorted(ops.available_backends("cpu"))
    bounds = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
    for timing in timings:
        assert 0 < timing["max_relative_error"] < bounds[timing["dtype"]], timing
    assert picture.stat().st_size > 50_000

    print_report(document, Console(width=120))
    said = capsys.readouterr().out
    assert "MSDeformAttn: 20 queries" in said and "grid_sample" in said and "Largest error" in said


@pytest.mark.skipif(not NUSCENES.is_dir(), reason="the nuScenes sample is not here")
def test_real_image(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modules, "cases", list)  # the module's timing does not depend on the image
    picture = tmp_path / "real.png"
    arguments = ["demo", "--op", "msda", "--rig", str(NUSCENES), "--queries", "5", "--json", "--output", str(picture)]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["camera"] == "CAM_FRONT"
    colors = np.array([query["heads_rgb"] for query in document["queries"]])
    assert 0 <= colors.min() and colors.max() <= 255 and colors.std() > 10
    assert picture.stat().st_size > 100_000


def test_drawing_survives_odd_images(tmp_path):
    """Wide, tall, and as small as one pixel of the coarsest level."""
    for shape in ((32, 320, 3), (96, 64, 3), (32, 32, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        draw(tmp_path / "odd.png", image, read_colors(image))
        assert (tmp_path / "odd.png").stat().st_size > 1000


def test_the_picture_is_what_its_suffix_says(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for suffix, begins in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        draw(tmp_path / f"picture.{suffix}", image, read_colors(image))
        assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(begins)


def test_op_must_be_known(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--op", "convolution"])
    assert stopped.value.code == 2
    assert "aggregation" in capsys.readouterr().err
