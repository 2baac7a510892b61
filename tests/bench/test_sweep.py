"""The sweep over shapes, and which of them stand out."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.gathers import gathers
from reimplementation.bench.shapes import INPUTS, Shape
from reimplementation.bench.steps import op_of
from reimplementation.bench.sweep import AXES, Figure, outliers, shapes_of
from reimplementation.bench.timing import Timing
from reimplementation.cli import main

SMALL = "--channels 8 16 --points 1 2 --levels 1 --batch-sizes 1 --queries 20 --repeats 2".split()


def figures(cost, us_of_a_point=100.0) -> list[Figure]:
    """A grid of shapes; each takes ``cost(shape)`` times what its bytes are worth."""
    found = []
    for shape in (Shape("msda", *sizes, 1) for sizes in product((32, 64, 128), (1, 2, 4), (1, 2, 3))):
        work = shape.channels * shape.points * shape.levels
        found.append(Figure(shape, "float32", "forward", Timing(us_of_a_point * work * cost(shape), 0, "graph"), work))
    return found


def test_a_shape_worse_than_its_neighbours_stands_out():
    odd = Shape("msda", 64, 2, 2, 1)
    found = outliers(figures(lambda shape: 3.0 if shape == odd else 1.0))
    assert [(figure.shape, times) for figure, times in found] == [(odd, pytest.approx(3.0))]


def test_a_shape_twice_as_slow_does_not():
    assert outliers(figures(lambda shape: 1.9 if shape.channels == 64 and shape.points == 2 else 1.0)) == []


def test_a_slope_does_not():
    assert outliers(figures(lambda shape: 1 / shape.points)) == []


def test_launches_are_not_judged():
    def launch_bound(shape):
        work = shape.channels * shape.points * shape.levels
        return max(1.0, 32 * 36 / work)

    assert outliers(figures(launch_bound)) == []


@pytest.mark.parametrize("op", INPUTS)
def test_inputs_have_the_shape(op):
    inputs = INPUTS[op](Shape(op, 16, 3, 2, 2, 70), torch.float32, torch.device("cpu"))
    with ops.use_backend("grid_sample"):
        assert op_of(inputs).function(*inputs).shape == (2, 70, 16)
    most = 2 * 70 * 3 * 2 * 4 * 16 * 4  # batch, queries, points, levels, corners, channels, bytes
    if op == "fused":  # boxes are behind the car, too, where more than one camera sees some, and some see none
        assert 0.5 * most < gathers(inputs).gathered_bytes < 1.5 * most
    else:
        assert 0.8 * most < gathers(inputs).gathered_bytes <= most


def test_what_is_swept_goes_from_few_queries_to_many():
    shapes = shapes_of("fused", dict.fromkeys(AXES))
    assert len(set(shapes)) == len(shapes)
    assert {shape.queries for shape in shapes} == {10, 100, 900, 10_000}
    assert Shape("fused", 256, 500, 4, 1, 10) in shapes and Shape("fused", 512, 16, 5, 16, 900) in shapes
    chosen = shapes_of("msda", dict.fromkeys(AXES) | {"queries": [10], "points": [500]})
    assert {(shape.queries, shape.points) for shape in chosen} == {(10, 500)}


def test_sweep_end_to_end(tmp_path, capsys):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the sweep times kernels, and there are none")
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert main(["sweep", "--device", "cpu", *SMALL, "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["results"]) == 3 * 2 * 2 * 2  # ops, channels, points, passes
    first = capsys.readouterr().out
    assert main(["sweep", "--read", str(file), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == first
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_channels_must_divide(capsys):
    assert main(["sweep", "--device", "cpu", "--channels", "12"]) == 2
    assert "multiples of 8; got [12]" in capsys.readouterr().err


def test_levels_are_bounded(capsys):
    assert main(["sweep", "--device", "cpu", "--levels", "6"]) == 2
    assert "levels must be at most 5; got 6" in capsys.readouterr().err
