"""The detector's benchmark on a small detector: what is timed, kept and shown."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reimplementation import cli
from reimplementation.bench import results
from reimplementation.bench.detector import measure, tables
from reimplementation.bench.detector.measure import Choice, DetectorResult
from reimplementation.bench.timing import Timing
from tests.markdown import ROOT
from tests.models.sparsedrive.small import CONFIG

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    CONFIG, num_cams=6, num_levels=3, det=dataclasses.replace(CONFIG.det, num_decoders=2), num_depth_levels=1
)
CALLED = DetectorResult(
    "inference", "cuda:0", "bfloat16", "frame", 1, Timing(12_500.0, 10.0, "events"), 845_000_000, 791, 4012.0, 0.061
)
REPLAYED = dataclasses.replace(CALLED, passed="frame graph", timing=Timing(5000.0, 1.0, "graph"), kernels=None)
TRAINED = DetectorResult("model", "cuda:0", "bfloat16", "training", 6, Timing(240_000.0, 1.0, "events"))


def measured(choice: Choice) -> tuple[list[DetectorResult], list[str], list[str]]:
    begun: list[str] = []
    failed: list[str] = []
    document = measure.measure_all(
        choice, CPU, 1, begins=begun.append, fails=failed.append, config=SMALL, size=(32, 64)
    )
    return document.results, begun, failed


def test_every_form_of_a_frame():
    found, begun, failed = measured(Choice(measure.FORMS, ["float32"], ["frame"]))
    assert begun == [f"{form} float32 frame" for form in measure.FORMS] and not failed
    assert [(r.form, r.batch, r.kernels) for r in found] == [(form, 1, None) for form in measure.FORMS]
    assert all(r.timing.median_us > 0 for r in found)


def test_training_is_of_models_alone(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(measure, "TRAINING_BATCH", 1)
    choice = Choice(["inference", "model"], ["float32"], ["training"])
    assert len(choice) == 1
    (found,), _, failed = measured(choice)
    assert (found.form, found.passed, found.batch) == ("model", "training", 1) and not failed


def test_a_graph_where_there_is_none():
    """On the CPU a call is timed, and that is no figure of a graph."""
    failed: list[str] = []
    with pytest.raises(RuntimeError, match="nothing could be timed"):
        measure.measure_all(
            Choice(["inference"], ["float32"], ["frame graph"]),
            CPU,
            1,
            begins=lambda _: None,
            fails=failed.append,
            config=SMALL,
            size=(32, 64),
        )
    assert failed == ["inference float32 frame graph failed: it waits for the GPU, which a graph cannot record"]


def test_files_and_tables(tmp_path, capsys):
    pytest.importorskip("rich")
    first, second, both = (tmp_path / name for name in ("first.json", "second.json", "both.json"))
    results.describe(CPU, [CALLED]).write(first)
    results.describe(CPU, [REPLAYED, TRAINED]).write(second)
    arguments = ["bench", "--detector", "--read", str(first), str(second)]
    assert cli.main([*arguments, "--json", str(both), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| `for_inference`, bfloat16 | 12.5 (80) | 5 (200) |  |" in said
    assert "| the model, bfloat16 autocast |  |  | 240 (25) |" in said
    assert "| `for_inference`, bfloat16 | 791 | 4.01 | 6.1% | 845 |" in said
    assert results.read_one(both, DetectorResult).results == [CALLED, REPLAYED, TRAINED]
    assert cli.main(arguments) == 0
    assert "frame graph" in capsys.readouterr().out


def test_the_page_has_the_committed_figures():
    document = results.read_one(ROOT / "benchmarks" / "detector" / "nvidia-h200.json", DetectorResult)
    assert tables.markdown(document) in (ROOT / "docs" / "sparsedrive.md").read_text()


def test_parts_of_different_runs():
    one = results.describe(CPU, [CALLED])
    other = dataclasses.replace(one, versions={**one.versions, "torch": "1.0"})
    with pytest.raises(ValueError, match="these files are of different machines or versions"):
        tables.joined([one, other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "--passes", "backward"], "--passes of --detector are frame, frame replayed, frame graph, "),
        (["--detector", "--dtypes", "float64"], "--dtypes of --detector are float32, float16, bfloat16; got float64"),
        (["--detector", "--plot", "a.png"], "--detector draws no picture"),
        (["--passes", "frame"], "--passes of an op or a module are "),
    ],
)
def test_what_does_not_fit(arguments, message, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
