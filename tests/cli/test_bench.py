"""`bench` end to end, at a size that a test can afford."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from reimplementation import ops
from reimplementation.cli import bench, main
from reimplementation.timing import measure
from reimplementation.workloads import aggregation_inputs, attention_inputs


@pytest.fixture
def tiny(monkeypatch):
    cases = {
        "aggregation": partial(aggregation_inputs, "rig", 1, num_queries=5, channels=8, strides=(16, 32)),
        "attention": partial(attention_inputs, "small-decoder"),
    }
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "DEFAULT_CASES", {"cpu": list(cases), "cuda": list(cases)})


def test_every_backend_and_pass(tiny, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["bench", "--device", "cpu", "--repeats", "2", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["threads"] == torch.get_num_threads()
    timed = {(r["case"], r["backend"], r["passed"]) for r in document["results"]}
    native = [b for b in ops.available_backends("cpu") if b != "grid_sample"]
    passes = [(b, p) for b in native for p in bench.PASSES] + [("grid_sample", p) for p in ("forward", "training")]
    assert timed == {(case, *run) for case in ("aggregation", "attention") for run in passes}
    assert all(r["timing"]["median_us"] > 0 for r in document["results"])
    assert "aggregation" in capsys.readouterr().out


def test_markdown_of_a_file(tiny, tmp_path, capsys):
    file = tmp_path / "figures.json"
    main(["bench", "--device", "cpu", "--repeats", "2", "--json", str(file)])
    capsys.readouterr()
    assert main(["bench", "--read", str(file), "--markdown"]) == 0
    table = capsys.readouterr().out
    if len(ops.available_backends("cpu")) > 1:
        assert "| aggregation |" in table and "| attention |" in table and "x)" in table


def test_markdown_wants_a_file(tiny, capsys):
    assert main(["bench", "--device", "cpu", "--repeats", "2", "--markdown", "--cases", "attention"]) == 2
    assert "--markdown needs --json or --read" in capsys.readouterr().err


def test_every_case_has_its_inputs():
    assert {case for cases in bench.DEFAULT_CASES.values() for case in cases} <= set(bench.CASES)


def test_measure_runs_every_step_in_turn():
    order = []
    timing = measure([lambda i=i: order.append(i) for i in range(3)], torch.device("cpu"), repeats=4)
    assert order == [0, 1, 2] * (len(order) // 3)
    assert timing.method == "wall"
    assert timing.median_us >= 0
