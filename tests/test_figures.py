"""Tables of figures that were written into a page by hand are those of the committed results."""

from __future__ import annotations

import json
from itertools import product

from reimplementation.bench.tables import three_digits
from tests.markdown import ROOT, table_rows

PHASES = ("all", "data", "forward", "loss", "backward", "optimizer")
STEPS = ("training, batch 16, eager", "training, batch 16, graph", "training, batch 32, graph")
CASES = (
    *("rig-bs1", "rig-bs6", "dense-bs1", "fused-rig-bs1", "fused-rig-bs6", "fused-dense-bs1"),
    *("msda-encoder", "msda-decoder", "msda-paper"),
)
ATTENTION = CASES[-3:]
# Of each row of the table: dtype, queries, parts, channels of a part, warps, points of a turn.
TILES = (
    *(("float32", *tile) for tile in ((4, 1, 32, 1, 4), (4, 1, 32, 1, 1), (8, 1, 32, 1, 4), (8, 1, 32, 1, 1))),
    *(("float32", *tile) for tile in ((8, 1, 32, 2, 4), (8, 2, 16, 1, 1))),
    *(("bfloat16", *tile) for tile in ((8, 1, 32, 1, 4), (8, 1, 32, 1, 1), (4, 1, 32, 1, 4), (16, 2, 16, 1, 1))),
)


def rows_under(page: str, beginning: str) -> list[list[str]]:
    """The rows of the table of a page whose head begins so."""
    table = (ROOT / "docs" / page).read_text().partition(beginning)[2].partition("\n\n")[0]
    return table_rows(beginning + table)[1:]


def test_steps_of_a_training():
    steps = json.loads((ROOT / "benchmarks" / "training" / "nvidia-h200.json").read_text())["steps"]
    rows = rows_under("training.md", "| a step of SparseDrive-S, bfloat16")
    assert len(rows) == len(STEPS)
    for row, name in zip(rows, STEPS):
        step = steps[name]
        figures = [step["samples_a_second"], *(step["ms_median"][phase] for phase in PHASES), step["peak_gb"]]
        assert [three_digits(float(cell)) for cell in row[1:]] == [three_digits(figure) for figure in figures], name


def test_several_gpus():
    document = json.loads((ROOT / "benchmarks" / "training" / "nvidia-h200.json").read_text())
    steps = document["several_gpus"]["steps"]
    rows = rows_under("training.md", "| a GPU's part of the batch, bfloat16")
    assert len(rows) == len(steps) / 2
    for row, way in zip(rows, ("16 a GPU, graph", "32 a GPU, graph", "16 a GPU, called")):
        one, two = (steps[f"{way}, {count}"] for count in ("one", "two"))
        figures = [one["samples_a_second"], one["ms_median"]["all"], two["samples_a_second"], two["ms_median"]["all"]]
        assert row[1:5] == list(map(three_digits, figures)), way
        assert row[5] == f"{two['samples_a_second'] / one['samples_a_second'] / 2:.0%}".replace("%", " %"), way
        assert row[6] == (three_digits(two["peak_gb"]) if "peak_gb" in two else ""), way


def test_drives_on_the_way():
    drives = json.loads((ROOT / "benchmarks" / "training" / "nvidia-h200.json").read_text())["drives"]
    judged = drives["judged_every_200_steps"]
    head = " | ".join(["| steps of `drives.yaml`", *(str(moment["step"]) for moment in judged)]) + " |"
    rows = [row[1:] for row in rows_under("training.md", head)]
    assert rows[0] == [str(moment["seconds_of_the_command"]) for moment in judged]
    for row, name in zip(rows[1:], ("mAP", "NDS", "map_mAP"), strict=True):
        assert row == [f"{moment[name]:.3f}" for moment in judged], name


def test_backbones_for_the_same_minutes():
    found = json.loads((ROOT / "benchmarks" / "training" / "nvidia-h200.json").read_text())["backbones"]
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    resnet, vit = found["drives"], found["drives_vit"]
    assert f"`drives.yaml` made {resnet['steps']} steps" in text and f"ResNet-50, {vit['steps']} in" in text
    for name, place, key in (("mAP", "boxes", "mAP"), ("NDS", "boxes", "NDS"), ("map lines", "lines", "mAP")):
        figures = (f"{found[config]['result'][place][key]:.3f}" for config in ("drives", "drives_vit"))
        assert f"{name} {' and '.join(figures)}" in text, name


def test_triton_beside_cuda():
    document = json.loads((ROOT / "benchmarks" / "triton" / "nvidia-h200.json").read_text())
    times = {(r["case"], r["backend"], r["passed"]): r["timing"]["median_us"] for r in document["results"]}
    rows = rows_under("triton.md", "| | `cuda` | `triton` | times |")
    assert len(rows) == len(CASES)
    for row, case in zip(rows, CASES):
        ours, tritons = (
            [times[case, backend, passed] for passed in ("forward", "backward")] for backend in ("cuda", "triton")
        )
        for cell, figures in zip(row[1:3], (ours, tritons)):
            assert [three_digits(float(part)) for part in cell.split(" / ")] == list(map(three_digits, figures)), case
        assert row[3] == " / ".join(f"{triton / cuda:.2f}" for triton, cuda in zip(tritons, ours)), case


def test_tiles_of_attention():
    document = json.loads((ROOT / "benchmarks" / "triton" / "attention-tiles-nvidia-h200.json").read_text())
    keys = ("dtype", "queries", "parts", "channels_of_a_part", "warps", "points_of_a_turn")
    forwards = [tile for tile in document["attention_tiles"] if tile["passed"] == "forward"]
    of_tile = {tuple(tile[key] for key in keys): tile["graph"] for tile in forwards}
    for row, tile in zip(rows_under("triton.md", "| queries x channels of a program"), TILES, strict=True):
        times = (of_tile[tile][case.removeprefix("msda-")] for case in ATTENTION)
        assert row[1:] == [*map(str, tile[4:]), *(f"{three_digits(t['us'])} ({t['times_cuda']:.2f})" for t in times)]


def beside_deformops() -> dict[tuple[str, str, str, str], float]:
    """Microseconds, by dtype, backend, case and pass."""
    document = json.loads((ROOT / "benchmarks" / "triton" / "deformops-nvidia-h200.json").read_text())
    return {(r["dtype"], r["backend"], r["case"], r["passed"]): r["timing"]["median_us"] for r in document["results"]}


def test_triton_beside_deformops():
    us = beside_deformops()
    sides = product(("float32", "bfloat16"), ("cuda", "triton", "deformops-triton"))
    for row, side in zip(rows_under("triton.md", "| attention | encoder | decoder |"), sides, strict=True):
        for cell, case in zip(row[1:], ATTENTION, strict=True):
            assert cell == " / ".join(three_digits(us[(*side, case, passed)]) for passed in ("forward", "training"))


def test_deformops_with_sums_in_float32():
    ops = json.loads((ROOT / "benchmarks" / "results" / "peers" / "nvidia-h200.json").read_text())["ops"]
    theirs = (ops[case.removeprefix("msda-")]["deformops triton bf16"]["bwd"] for case in ATTENTION)
    us = beside_deformops()
    ours = (us["bfloat16", "triton", case, "training"] for case in ATTENTION)
    text = " ".join((ROOT / "docs" / "triton.md").read_text().split())
    a, b, c, d, e, f = map(three_digits, (*theirs, *ours))
    assert f"its backward alone takes {a}, {b} and {c} us" in text and f"with the forward, {d}, {e} and {f}." in text
