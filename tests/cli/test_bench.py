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


def figures() -> dict:
    """What `bench --json` writes, with one result."""
    timing = {"median_us": 20.0, "spread_us": 1.0, "method": "wall"}
    result = {"case": "rig", "device": "cpu", "backend": "cpu", "dtype": "float32", "passed": "forward"}
    return {
        "machine": {"device": "some CPU", "cpu": "some CPU", "threads": 2},
        "versions": {"reimplementation": "0.1", "torch": "2.13", "cuda": None, "python": "3.11"},
        "date": "2026-11-21",
        "results": [result | {"timing": timing}],
    }


def changed(*keys, value=...) -> str:
    """The figures as text, with the value under the keys replaced, or removed."""
    document = place = figures()
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return json.dumps(document)


BROKEN = {  # what is wrong: (the file's text, what the message says)
    "empty": ("", "is not valid JSON"),
    "truncated": (json.dumps(figures())[:100], "is not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "is not valid JSON"),
    "nested without end": ("[" * 100_000, "is not valid JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "no results": (changed("results"), "missing results"),
    "results in an object": (changed("results", value={}), "results must be a list"),
    "text for a result": (changed("results", 0, value="fast"), "results[0] must be an object"),
    "no timing": (changed("results", 0, "timing"), "results[0]: missing timing"),
    "a number for the timing": (changed("results", 0, "timing", value=3), "timing must be an object"),
    "no median": (changed("results", 0, "timing", "median_us"), "timing: missing median_us"),
    "text for the median": (changed("results", 0, "timing", "median_us", value="1"), "median_us must be numbers"),
    "NaN": (changed("results", 0, "timing", "spread_us", value=float("nan")), "spread_us must be finite"),
    "zero": (changed("results", 0, "timing", "median_us", value=0), "median_us must be positive"),
    "a number for the case": (changed("results", 0, "case", value=3), "case must be 1 to 64 printable characters"),
    "escape sequence": (changed("results", 0, "case", value="\x1b[2J"), "case must be 1 to 64 printable characters"),
    "escape sequence in the machine": (changed("machine", "device", value="\x1b[2J"), "printable characters"),
    "no machine": (changed("machine"), "missing machine"),
    "a list for the versions": (changed("versions", value=[]), "versions must be an object"),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("arguments", [[], ["--markdown"]], ids=["table", "markdown"])
def test_a_broken_file_is_one_line(tmp_path, capsys, content, message, arguments):
    file = tmp_path / "figures.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["bench", "--read", str(file), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and str(file) in said.err and message in said.err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["bench", "--read", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert main(["bench", "--read", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_figures_that_read_like_markup(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text(changed("results", 0, "case", value="[/red]"))
    assert main(["bench", "--read", str(file)]) == 0
    assert "[/red]" in capsys.readouterr().out


def test_markdown_without_kernels(tmp_path, capsys):
    file = tmp_path / "figures.json"
    file.write_text(changed("results", 0, "backend", value="grid_sample"))
    assert main(["bench", "--read", str(file), "--markdown"]) == 2
    assert "no figures of cuda or cpu kernels" in capsys.readouterr().err


def test_every_case_has_its_inputs():
    assert {case for cases in bench.DEFAULT_CASES.values() for case in cases} <= set(bench.CASES)


def test_measure_runs_every_step_in_turn():
    order = []
    timing = measure([lambda i=i: order.append(i) for i in range(3)], torch.device("cpu"), repeats=4)
    assert order == [0, 1, 2] * (len(order) // 3)
    assert timing.method == "wall"
    assert timing.median_us >= 0
