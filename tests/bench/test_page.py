"""The page of figures: what it computes, and the comparison that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reimplementation.bench import page
from reimplementation.bench.clients.measure import ClientResult, Side
from reimplementation.bench.comparison import OpTimes, read_comparison
from reimplementation.bench.timing import Timing
from tests.bench.figures import document, result

ROOT = Path(__file__).parents[2]
COMPARISON = ROOT / "benchmarks" / "results" / "peers" / "nvidia-h200.json"


def test_what_determinism_costs_is_the_worst_of_the_figures(tmp_path):
    (tmp_path / "results").mkdir()
    document(
        result(passed="backward", us=10),
        result(passed="backward deterministic", us=15),
        result(case="msda-decoder", dtype="float16", passed="backward", us=10),
        result(case="msda-decoder", dtype="float16", passed="backward deterministic", us=33),
    ).write(tmp_path / "results" / "some.json")
    written = page.render(tmp_path).replace("\n", " ")
    assert "up to 3.3 times as long (msda-decoder in float16, NVIDIA H200)" in written


def test_models_of_others_have_a_row_each(tmp_path):
    def side(us: float, share: float | None, gpu_us: float | None = None) -> Side:
        return Side(Timing(us, 0.0, "events"), share, int(us * 1e5), gpu_us)

    (tmp_path / "results" / "clients").mkdir(parents=True)
    document(result()).write(tmp_path / "results" / "some.json")
    common = "a_detector", "cuda", "bfloat16", 8
    document(
        ClientResult(*common, "forward", 12, side(123e3, 0.7), side(50e3, 0.25), side(61e3, 0.4)),
        ClientResult(*common, "training", 12, side(327e3, None, 300e3), side(120e3, None, 100e3)),
    ).write(tmp_path / "results" / "clients" / "some.json")
    written = page.render(tmp_path)
    cells = "123 → 50", "2.46x", "", "61", "327 → 120", "2.73x", "3.00x", "", "32.7 → 12", "70% → 25%"
    assert f"| a_detector | {' | '.join(cells)} |" in written


def test_one_file_a_machine():
    machines = [json.loads(path.read_text())["machine"] for path in COMPARISON.parents[1].glob("*.json")]
    assert len({machine["device"] for machine in machines}) == len(machines) > 0


def test_the_comparison_is_read():
    found = read_comparison(COMPARISON)
    raw = json.loads(COMPARISON.read_text())
    times = raw["ops"]["encoder"]["deformops triton bf16 nativeatomics"]
    assert found.ops["encoder"]["deformops triton nativeatomics", "bfloat16"] == OpTimes(**times)
    assert found.events["rig-bs1"].fwd == raw[f"sparsedrive_op_events_{found.events_date}"]["rig-bs1"][0]
    assert len(found.models) == len(raw["models"]) and len(found.modules) == len(raw["modules"])


def test_gains_are_theirs_over_ours():
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    ops = read_comparison(COMPARISON).ops["encoder"]
    theirs, ours = ops["ddetr", "float32"], ops["ours", "float32"]
    [line] = [line for line in written.splitlines() if line.startswith("| msda-encoder | float32 | Deformable DETR |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")][3:]
    expected = []
    for their, our in ((theirs.fwd, ours.fwd), (theirs.bwd, ours.bwd)):
        expected += [f"{their:.0f}", f"{our:.0f}", f"{their / our:.2f}x"]
    assert cells == expected


def changed(**fields) -> dict:
    return json.loads(COMPARISON.read_text()) | fields


BROKEN = {  # what is wrong: (the document, what the message says)
    "no models": ({k: v for k, v in changed().items() if k != "models"}, "missing models"),
    "no events": ({k: v for k, v in changed().items() if "events" not in k}, "missing sparsedrive_op_events"),
    "ops in a list": (changed(ops=[]), "ops must be an object; got []"),
    "a name without a dtype": (changed(ops={"encoder": {"ours": {"fwd": 1, "bwd": 1}}}), "named like 'ours fp32'"),
    "text for a time": (changed(ops={"encoder": {"ours fp32": {"fwd": "1", "bwd": 1}}}), "fwd must be numbers"),
    "a negative time": (changed(ops={"encoder": {"ours fp32": {"fwd": -1, "bwd": 1}}}), "fwd must be positive"),
    "escape sequence": (changed(machine="\x1b[2J"), "machine must be 1 to 200 printable characters"),
    "a model without its pass": (changed(models=[{"model": "a", "size": [1, 1]}]), "models[0]: missing pass"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_comparison_is_named(tmp_path, content, message):
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
        read_comparison(file)
    assert str(file) in str(raised.value) and message in str(raised.value)
