"""`bench` end to end, at a size that a test can afford."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from reimplementation import ops
from reimplementation.bench import cases, floor, goals, results, tables, timing
from reimplementation.bench.inputs import aggregation_inputs, aggregation_problem, attention_inputs
from reimplementation.bench.results import Document, Result
from reimplementation.bench.timing import Timing, measure, measure_host
from reimplementation.cli import bench, main
from reimplementation.data.rig import nuscenes_like_rig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Small cases instead of the real ones."""
    rig = nuscenes_like_rig().scaled_to(88, 32)
    tiny_cases = {
        "aggregation": cases.OpCase(partial(aggregation_inputs, num_queries=5, channels=8, strides=(16, 32))),
        "attention": cases.OpCase(partial(attention_inputs, "small-decoder")),
        "module": cases.ModuleCase(partial(aggregation_problem, rig, num_queries=4, batch_size=2)),
        "overhead-msda": cases.HostCase(partial(attention_inputs, "one-query")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CASES", tiny_cases)
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


def result(case="rig-bs1", backend="cuda", passed="forward", us=10.0, dtype="float32", **fields) -> Result:
    return Result(case, "cuda", backend, dtype, passed, Timing(us, 0.1, "graph"), **fields)


def document(*found: Result, **machine) -> Document:
    machine = {"device": "NVIDIA H200", "cpu": "a", "threads": 1, **machine}
    return Document(machine, {"torch": "2.11", "cuda": "13.0"}, "2026-01-02", list(found))


def test_every_backend_and_pass(tiny, measured):
    file, printed = measured
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == torch.get_num_threads() and written["machine"]["copy_gb_per_s"] > 0
    timed = {(r["case"], r["backend"], r["passed"]) for r in written["results"]}
    backends = ops.available_backends("cpu")
    assert timed == {(name, b, p) for name, case in tiny.items() for b in backends for p in case.passes(b)}
    assert all(r["timing"]["median_us"] > 0 for r in written["results"])
    for r in written["results"]:
        counted = r["case"] in ("aggregation", "attention") and r["passed"] == "forward"
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
    assert all(r["extra_bytes"] > 0 for r in timed if not r["passed"].startswith("call"))


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
        assert "| aggregation | forward |" in table and "| module | training |" in table and "x |" in table
        assert "| overhead-msda | call backward |" in table


def test_files_of_one_machine_are_merged(tmp_path):
    first = document(result(us=1), result(passed="backward", us=2))
    second = document(result(us=3), result(dtype="float16", us=4))
    other = document(result(us=5), device="another")
    paths = []
    for i, each in enumerate((first, replace(second, date="2026-01-01"), other)):
        paths.append(tmp_path / f"{i}.json")
        each.write(paths[-1])
    merged, alone = results.read(paths)
    assert [r.timing.median_us for r in merged.results] == [3, 2, 4]
    assert merged.date == "2026-01-01, 2026-01-02"
    assert alone == other


@pytest.mark.parametrize(("device", "documents"), [("NVIDIA H200", 1), ("a", 2)], ids=["GPU", "CPU"])
def test_threads_of_the_host_tell_cpus_apart(tmp_path, device, documents):
    paths = [tmp_path / "2.json", tmp_path / "16.json"]
    for path, case in zip(paths, ("rig-bs1", "rig-bs6")):
        both = result("module-bs1", us=1, passed=path.stem), result(case, us=2)
        document(*both, device=device, threads=int(path.stem)).write(path)
    read = results.read(paths)
    assert len(read) == documents
    cases = [r.case for r in read[0].results]
    assert cases == sorted(cases, key=cases.index) and len(cases) == 4 / documents  # the parts of a case lie together


def test_another_file_is_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"results": [{"case": "rig-bs1"}]}')
    assert main(["bench", "--read", str(file)]) == 2
    assert f"{file}: missing machine" in capsys.readouterr().err


def test_ratios_and_goals():
    backward = result(passed="backward", us=100)
    found = document(
        result(us=12, gathered_bytes=24_000_000, extra_bytes=5),
        result(us=600, backend="grid_sample"),
        result(us=8, backend="floor"),
        backward,
        result(passed="backward frozen", us=50),
    )
    forward = found.results[0]
    assert forward.gather_bandwidth == pytest.approx(2000)  # 24 MB in 12 us
    assert (tables.grid_sample_us(forward, found), tables.floor_us(forward, found)) == (600, 8)
    assert tables.grid_sample_us(backward, found) is None and tables.floor_us(backward, found) is None
    assert [tables.default_us(r, found) for r in found.results] == [None, None, None, None, 100]
    assert [goals.goal_us(r) for r in found.results] == [24, None, None, 105, None]
    table = tables.markdown(found)
    assert "| rig-bs1 | forward | 12 / 24 | 50.0x | 1.50x |" in table
    assert "| rig-bs1 | backward frozen | 50 |  |  |" in table


def test_every_goal_belongs_to_a_case():
    for device, case, passed, dtype in goals.GOALS:
        assert device in goals.MACHINES and dtype in bench.DTYPES
        assert passed in cases.CASES[case].passes(device), (case, passed)
        assert case in cases.DEFAULT_CASES[device]


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


def test_floor_names_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(floor, "TOOLKIT", tmp_path)
    with pytest.raises(RuntimeError, match="--floor needs nvcc"):
        floor.find_nvcc()


def test_floor_is_built_by_nvcc(monkeypatch):
    try:
        floor.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert callable(floor.build.__wrapped__(torch.device("cuda")))


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
    assert {case for names in cases.DEFAULT_CASES.values() for case in names} <= set(cases.CASES)


def test_measure_runs_every_step_in_turn():
    order = []
    taken = measure([lambda i=i: order.append(i) for i in range(3)], torch.device("cpu"), repeats=4)
    assert order == [0, 1, 2] * (len(order) // 3)
    assert taken.method == "wall"
    assert taken.median_us >= 0


def test_measure_host_prepares_each_call():
    made, used = [], []

    def prepare():
        made.append(len(made))
        return made[-1]

    taken = measure_host(used.append, torch.device("cpu"), repeats=2, prepare=prepare)
    assert used == made and len(made) > 2
    assert taken.method == "host" and taken.median_us >= 0


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
