"""The README keeps its promises: its lines run when pasted, and its figures are those of committed results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reimplementation import cli
from reimplementation.bench.clients.measure import ClientResult
from reimplementation.bench.detector.measure import DetectorResult
from reimplementation.bench.results import read_one
from reimplementation.bench.tables import three_digits
from tests.markdown import README, ROOT, code_blocks, commands, table_rows

RESULTS = ROOT / "benchmarks" / "results"
SAMPLE_LITTLE = ("rt_detr", "d_fine", "deimv2", "lw_detr", "rf_detr", "omdet_turbo", "pp_doclayout")
ROUNDING = 0.05  # of a factor with one decimal
THREE_DIGITS = 0.01  # of a quotient of two figures with three digits


def test_is_a_page():
    assert len(README.read_text().splitlines()) <= 150


def test_ten_lines_run_when_pasted(tmp_path):
    (code,) = code_blocks(README, "python")
    assert len(code.splitlines()) == 10
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == code.splitlines()[-1].partition("# ")[2]


def test_commands_run(capsys):
    run = [words[3:] for words in commands(README) if words[:3] == ["python", "-m", "reimplementation"]]
    assert run == [["info"], ["--help"]]
    assert cli.main(run[0]) == 0
    with pytest.raises(SystemExit, match="0"):
        cli.main(run[1])
    assert "info" in capsys.readouterr().out


@pytest.fixture
def rows() -> list[list[str]]:
    """The rows of the tables of what a user gains."""
    section = README.read_text().partition("## What you gain")[2].partition("\n## ")[0]
    return [row for row in table_rows(section) if any(re.search(r"\d [/→] \d", cell) for cell in row)]


@pytest.fixture
def peers() -> list[dict]:
    """The results in which peers were measured."""
    return [json.loads(path.read_text()) for path in (RESULTS / "peers").glob("*.json")]


@pytest.fixture
def models() -> list[ClientResult]:
    """Other people's models under bfloat16 autocast, at batch 8."""
    documents = [read_one(path, ClientResult) for path in (RESULTS / "clients").glob("*.json")]
    runs = [run for document in documents for run in document.results]
    return [run for run in runs if (run.device, run.dtype, run.batch) == ("cuda", "bfloat16", 8)]


class TestFigures:
    def test_are_those_of_a_committed_file(self, rows, peers, models):
        """Bytes as GB, microseconds as milliseconds."""
        measured = set()
        for value in numbers([*peers, *map(dataclasses.asdict, models)]):
            measured |= {three_digits(value), three_digits(value / 1e3), three_digits(value / 1e9)}
        shown = [figure for row in rows for cell in row if "/" in cell or "→" in cell for figure in figures(cell)]
        shown = [figure for figure in shown if figure[-1] != "x"]
        assert len(shown) == 52
        assert set(shown) <= measured, set(shown) - measured

    def test_factors_are_those_of_the_figures(self, rows):
        compared = 0
        for row in rows:
            for before, after, factor in factors(row):
                assert abs(before / after - factor) <= ROUNDING + THREE_DIGITS * factor, row
                compared += 1
        assert compared == 22

    def test_models_that_sample_little(self, models):
        text = " ".join(README.read_text().split())
        span = r"([\d.]+) to ([\d.]+)"
        called = re.search(rf"run {span} times as fast forward, and {span}", text).groups()
        alone = re.search(rf"the GPU's part alone is {span} and {span} times", text).groups()
        for number, passed in enumerate(("forward", "training")):
            runs = [run for run in models if run.passed == passed and run.model.startswith(SAMPLE_LITTLE)]
            for stated, factors_found in (
                (called, [run.speedup for run in runs]),
                (alone, [run.original.gpu_us / run.accelerated.gpu_us for run in runs]),
            ):
                low, high = map(float, stated[2 * number : 2 * number + 2])
                assert (low, high) == (round(min(factors_found), 2), round(max(factors_found), 2))

    def test_the_detector(self):
        text = " ".join(README.read_text().split())
        replayed, called, plain, mean_ap, minutes = map(
            float,
            re.search(
                r"cameras takes ([\d.]+) ms .* and ([\d.]+) called; .* takes ([\d.]+)\. "
                r".* mAP of ([\d.]+) in ([\d.]+) min",
                text,
            ).groups(),
        )
        frames = read_one(ROOT / "benchmarks" / "detector" / "nvidia-h200.json", DetectorResult).results
        times = {(r.form, r.passed): r.timing.median_us / 1e3 for r in frames if r.dtype == "float32"}
        for said, of in (
            (replayed, ("inference", "frame replayed")),
            (called, ("inference", "frame")),
            (plain, ("plain", "frame")),
        ):
            assert three_digits(times[of]) == three_digits(said), of
        drives = json.loads((ROOT / "benchmarks" / "training" / "nvidia-h200.json").read_text())["drives"]
        assert round(drives["result"]["boxes"]["mAP"], 3) == mean_ap
        assert round(drives["seconds_of_the_command"] / 60, 1) == minutes

    def test_what_determinism_costs(self):
        text = " ".join(README.read_text().split())
        low, high = map(float, re.search(r"the backward takes ([\d.]+) to ([\d.]+) times as long", text).groups())
        documents = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
        times = {
            (result["case"], result["dtype"], result["passed"]): result["timing"]["median_us"]
            for document in documents
            for result in document["results"]
            if document["machine"]["device"] == "NVIDIA H200" and result["backend"] == "cuda"
        }
        costs = [
            time / times[case, dtype, "backward"]
            for (case, dtype, passed), time in times.items()
            if passed == "backward deterministic"
        ]
        assert (low, high) == (round(min(costs), 1), round(max(costs), 1))


def numbers(document) -> Iterator[float]:
    """All numbers in a JSON document."""
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list):
        for entry in document:
            yield from numbers(entry)
    elif isinstance(document, (int, float)):
        yield document


def figures(cell: str) -> list[str]:
    """The figures of a cell; a factor keeps its x."""
    return re.findall(r"\d+(?:\.\d+)?x?", cell)


def factors(row: list[str]) -> Iterator[tuple[float, float, float]]:
    """Before, after and the stated factor of each comparison in a row of either table."""
    if "→" in row[1]:
        for before, after, factor in (figures(cell) for cell in row[1:3]):
            yield float(before), float(after), float(factor[:-1])
    else:
        for before, after, factor in zip(*(figures(cell) for cell in row[2:5])):
            yield float(before), float(after), float(factor[:-1])
