"""`bench` end to end, at a size that a test can afford."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

from reimplementation import ops
from reimplementation.bench import cases, floor, peers, run, timing
from reimplementation.bench.feature_aggregation import FeatureAggregationInputs, feature_aggregation_inputs
from reimplementation.bench.inputs import (
    AggregationInputs,
    AttentionInputs,
    aggregation_inputs,
    aggregation_problem,
    attention_inputs,
    attention_problem,
)
from reimplementation.cli import bench, main, sweep
from reimplementation.data.rig import nuscenes_like_rig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Small cases instead of the real ones."""
    rig = nuscenes_like_rig().scaled_to(88, 32)
    tiny_cases = {
        "aggregation": cases.OpCase(
            AggregationInputs, partial(aggregation_inputs, num_queries=5, channels=8, strides=(16, 32))
        ),
        "fused": cases.OpCase(
            FeatureAggregationInputs,
            partial(feature_aggregation_inputs, num_queries=5, channels=8, strides=(16, 32), attn_drop=0.15),
        ),
        "attention": cases.OpCase(AttentionInputs, partial(attention_inputs, "small-decoder")),
        "module": cases.ModuleCase(partial(aggregation_problem, rig, num_queries=4, batch_size=2), attn_drop=0.15),
        "layer": cases.ModuleCase(partial(attention_problem, "small-encoder")),
        "overhead-msda": cases.HostCase(partial(attention_inputs, "one-query")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CASES", tiny_cases)
        patch.setattr(run, "CASES", tiny_cases)
        patch.setattr(bench, "DEFAULT_CASES", {"cpu": list(tiny_cases), "cuda": list(tiny_cases)})
        patch.setattr(cases, "ROTATED_BYTES", 2**16)
        patch.setattr(floor, "COPIED_BYTES", {"cpu": 2**16, "cuda": 2**16})
        patch.setattr(timing, "HOST_CALLS", 2)
        patch.setattr(timing, "WARM_UP", 1)
        patch.setattr(timing, "HOST_WARM_UP_S", 0.0)
        yield tiny_cases


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """The file of a run on the CPU, and what the run printed."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["bench", "--device", "cpu", "--repeats", "2", "--json", str(file)]) == 0
    return file, printed.getvalue()


def test_every_backend_and_pass(tiny, measured):
    file, printed = measured
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["copy_gb_per_s"] > 0
    timed = {(r["case"], r["backend"], r["passed"]) for r in written["results"]}
    backends = ops.available_backends("cpu")
    assert timed == {(name, b, p) for name, case in tiny.items() for b in backends for p in case.passes(b)}
    assert all(r["timing"]["median_us"] > 0 for r in written["results"])
    for r in written["results"]:
        counted = r["case"] in ("aggregation", "fused", "attention") and r["passed"] == "forward"
        assert (r["gathered_bytes"] is not None) == counted, r
    assert "aggregation" in printed and "overhead-msda" in printed


@pytest.mark.cuda
def test_every_pass_on_cuda(tiny, tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--device", "cuda", "--dtypes", "float32", "bfloat16", "--repeats", "2", "--json", str(file)]
    assert main(["bench", *arguments]) == 0
    timed = [r for r in json.loads(file.read_text())["results"] if r["backend"] == "cuda"]
    by = {(r["case"], r["passed"], r["dtype"]): r["timing"]["method"] for r in timed}
    dtypes = ("float32", "bfloat16")
    assert set(by) == {(n, p, d) for n, case in tiny.items() for p in case.passes("cuda") for d in dtypes}
    for dtype in dtypes:
        assert by["aggregation", "forward", dtype] == by["module", "forward graph", dtype] == "graph"
        assert by["module", "forward", dtype] == "events" and by["overhead-msda", "call training", dtype] == "host"
    timed = [r for r in timed if "graphed" not in r["passed"]]
    assert all(r["extra_bytes"] > 0 for r in timed if not r["passed"].startswith("call"))
    assert all(r["kept_bytes"] > 0 for r in timed if r["case"] in ("module", "layer") and "training" in r["passed"])


def test_a_warm_pass_keeps_to_one_set_of_inputs(tiny, monkeypatch):
    timed = {}
    prepared = cases.PreparedOp([tiny["aggregation"].make_inputs(seed=seed) for seed in range(3)])
    for passed in ("forward", "forward warm"):
        monkeypatch.setattr(cases, "measure", lambda steps, *_, passed=passed: timed.update({passed: len(steps)}))
        prepared.measure("grid_sample", passed, 1)
    assert timed == {"forward": 3, "forward warm": 1}


def test_passes_and_cases_can_be_chosen(tmp_path):
    file = tmp_path / "figures.json"
    chosen = ["--cases", "attention", "module", "--passes", "forward", "--backends", "grid_sample"]
    assert main(["bench", "--device", "cpu", "--repeats", "2", *chosen, "--json", str(file)]) == 0
    timed = [(r["case"], r["passed"]) for r in json.loads(file.read_text())["results"]]
    assert timed == [("attention", "forward"), ("module", "forward")]


def test_markdown_of_a_file(measured, capsys):
    assert main(["bench", "--read", str(measured[0]), "--markdown"]) == 0
    table = capsys.readouterr().out
    if len(ops.available_backends("cpu")) > 1:
        assert "| aggregation | forward |" in table and "| module | training |" in table
        assert "| case | pass | dtype | ours | grid_sample |" in table and "x) |" in table
        assert "| overhead-msda | call backward |" in table


def test_another_file_is_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"results": [{"case": "rig-bs1"}]}')
    assert main(["bench", "--read", str(file)]) == 2
    assert f"{file}: missing machine" in capsys.readouterr().err


def test_plot(measured, tmp_path):
    picture = tmp_path / "bars.png"
    assert main(["bench", "--read", str(measured[0]), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "--read", str(measured[0]), "--cases", "overhead-msda", "--plot", str(picture)]) == 2


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_figures_can_be_read(file, capsys):
    assert main(["bench", "--read", str(file), "--markdown"]) == 0
    assert "| case | pass |" in capsys.readouterr().out


def test_floor_is_for_cuda(capsys):
    assert main(["bench", "--device", "cpu", "--floor"]) == 2
    assert "--floor is a CUDA kernel" in capsys.readouterr().err


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
    "a number for the case": (changed("results", 0, "case", value=3), "case must be 1 to 200 printable characters"),
    "escape sequence": (changed("results", 0, "case", value="\x1b[2J"), "case must be 1 to 200 printable characters"),
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
    assert {case for names in cases.DEFAULT_CASES.values() for case in names} <= set(cases.CASES)


def test_what_fails_is_said_and_left_out(tiny, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("too little memory")

    monkeypatch.setattr(cases.PreparedModule, "measure", fail)
    file = tmp_path / "figures.json"
    chosen = ["--cases", "module", "attention", "--passes", "forward", "--backends", "grid_sample", "--repeats", "2"]
    assert main(["bench", "--device", "cpu", *chosen, "--json", str(file)]) == 0
    assert "module float32 grid_sample forward failed: too little memory" in capsys.readouterr().err
    assert [r["case"] for r in json.loads(file.read_text())["results"]] == ["attention"]
    assert main(["bench", "--device", "cpu", *chosen, "--cases", "module"]) == 2
    assert "nothing was timed" in capsys.readouterr().err


def test_missing_kernels_are_named(monkeypatch, tmp_path, capsys):
    """Where plain PyTorch alone would be timed, a line on stderr says why, and what to do."""
    monkeypatch.setattr(ops, "available_backends", lambda device: ["grid_sample"])
    monkeypatch.setattr(ops.backends, "why_missing", lambda device: "it is not built. To build it: pip install it")
    chosen = ["--cases", "attention", "--passes", "forward", "--repeats", "2", "--json", str(tmp_path / "figures.json")]
    assert main(["bench", "--device", "cpu", *chosen]) == 0
    said = capsys.readouterr().err
    assert "timing grid_sample alone: no cpu kernels: it is not built. To build it: pip install it" in said
    assert main(["bench", "--device", "cpu", *chosen, "--backends", "grid_sample"]) == 0  # asked for, so not missed
    assert "no cpu kernels" not in capsys.readouterr().err


def test_peers_are_timed_beside_ours(monkeypatch, tmp_path, capsys):
    """Those that are there and right; of the others a line says why not."""

    def grid_sample(*operands):
        with ops.use_backend("grid_sample"):
            return ops.ms_deform_attn(*operands)

    def missing(device):
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    stand_ins = {
        "right": peers.Peer("numpy", AttentionInputs, lambda device: grid_sample),
        "wrong": peers.Peer("numpy", AttentionInputs, lambda device: lambda *operands: 2 * grid_sample(*operands)),
        "absent": peers.Peer("elsewhere", AttentionInputs, missing),
    }
    for name in list(peers.PEERS):
        monkeypatch.delitem(peers.PEERS, name)
    for name, peer in stand_ins.items():
        monkeypatch.setitem(peers.PEERS, name, peer)
    file, picture = tmp_path / "figures.json", tmp_path / "bars.png"
    chosen = ["--cases", "attention", "aggregation", "--backends", "grid_sample", "--repeats", "2", "--peers"]
    assert main(["bench", "--device", "cpu", *chosen, "--json", str(file), "--plot", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "absent is left out: elsewhere is not installed; try: pip install elsewhere" in shown.err
    assert "attention float32 wrong forward failed: its output is 1.0e+00 of its length away from ours" in shown.err
    assert "│ right" in shown.out and picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(file.read_text())
    timed = {(r["case"], r["passed"]) for r in document["results"] if r["backend"] == "right"}
    assert timed == {("attention", "forward"), ("attention", "training")}
    assert "wrong" not in {r["backend"] for r in document["results"]}
    assert document["versions"]["numpy"] == __import__("numpy").__version__


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    for command in (["bench"], ["sweep"]):
        assert main([*command, "--device", "cuda"]) == 2
        said = capsys.readouterr().err
        assert "--device cuda needs a PyTorch with CUDA" in said and said.count("\n") == 1
        for odd in ("mps", "meta", "gpu"):
            assert main([*command, "--device", odd]) == 2
            assert f"--device must be cpu, cuda or cuda:N; got '{odd}'" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "--device", "cuda:1"]) == 2
    assert "--device cuda:1 is not there: PyTorch sees 1 GPU\n" in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_what_its_suffix_says(measured, tmp_path, suffix, begins):
    picture = tmp_path / f"bars.{suffix}"
    assert main(["bench", "--read", str(measured[0]), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(begins)


def test_a_suffix_without_a_format_is_refused(measured, tmp_path, capsys):
    for name in ("bars.txt", "bars"):
        assert main(["bench", "--read", str(measured[0]), "--plot", str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert f"--plot {tmp_path / name} must end in one of" in said.err and ".svg" in said.err and said.out == ""
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_repeats_must_be_a_number(count, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--repeats", count])
    assert stopped.value.code == 2
    assert f"--repeats: expected a positive whole number; got '{count}'" in capsys.readouterr().err


def test_the_committed_page_is_what_the_command_writes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["bench", "--page", "benchmarks"]) == 0
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert capsys.readouterr().out == page, "write it again: python -m reimplementation bench --page benchmarks"
    assert "python -m reimplementation bench --page benchmarks > docs/benchmarks.md" in page


def test_a_folder_without_results(tmp_path, capsys):
    assert main(["bench", "--page", str(tmp_path)]) == 2
    assert f"there are no results in {tmp_path / 'results'}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "sweep"])
def test_a_folder_that_is_not_there_is_named_before_the_work_begins(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda options: pytest.fail("it began"))
    monkeypatch.setattr(sweep, "_measure", lambda options: pytest.fail("it began"))
    for name in (tmp_path, tmp_path / "nowhere" / "figures.json"):
        assert main([command, "--json", str(name)]) == 2
        assert f"--json {name} must name a file in a folder that exists" in capsys.readouterr().err


def test_parts_of_a_run_are_joined(tmp_path, capsys):
    parts = [tmp_path / "forward.json", tmp_path / "training.json"]
    for part in parts:
        part.write_text(changed("results", 0, "passed", value=part.stem))
    whole = tmp_path / "whole.json"
    assert main(["bench", "--read", *map(str, parts), "--json", str(whole)]) == 0
    assert [r["passed"] for r in json.loads(whole.read_text())["results"]] == ["forward", "training"]
    parts[1].write_text(changed("machine", "threads", value=4))
    assert main(["bench", "--read", *map(str, parts), "--json", str(whole)]) == 2
    assert "holds one machine's results; those read are of 2" in capsys.readouterr().err


def test_what_the_page_tells_to_type_is_understood(monkeypatch):
    page = (ROOT / "docs" / "benchmarks.md").read_text().replace("\\\n", "")
    commands = re.findall(r"python -m reimplementation ([^`\n>]+)", page)
    taken = []
    for command in (bench, sweep):
        monkeypatch.setattr(command, "run", taken.append)
    assert [main(shlex.split(command)) for command in commands] == [0] * len(taken)
    assert any(options.peers for options in taken if "peers" in options) and len(taken) > 4
