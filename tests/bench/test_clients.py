"""`bench --clients` end to end, on a stand-in for a model of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from reimplementation.bench import timing
from reimplementation.bench.clients import measure, models
from reimplementation.cli import main
from tests.integrations.test_acceleration import CHANNELS, LEVELS, SHAPES, MSDeformAttn


class Detector(nn.Module):
    """Two layers that attend, and outputs under names as transformers' models have them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = MSDeformAttn(), MSDeformAttn(), nn.Linear(CHANNELS, 3)

    def forward(self, pixel_values):
        rows = pixel_values.flatten(2).transpose(1, 2)
        shapes = torch.tensor(SHAPES)
        starts = torch.tensor([0, 24])
        points = torch.full((*rows.shape[:2], LEVELS, 2), 0.5)
        for layer in (self.first, self.second):
            rows = layer(rows, points, rows, shapes, starts)
        return {"logits": self.head(rows), "nothing": None}


class StandIn:
    def build(self, device):
        return Detector().to(device)

    def inputs(self, batch, device):
        return {"pixel_values": torch.randn(batch, CHANNELS, 5, 6, device=device)}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(models.MODELS, "stand_in", StandIn())
    monkeypatch.setattr(measure, "versions", lambda: {"transformers": "5.0"})
    monkeypatch.setattr(timing, "WARM_UP", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BENCH = ["bench", "--device", "cpu", "--repeats", "1", "--clients", "stand_in"]


def test_figures(tmp_path, capsys):
    file, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    assert main([*BENCH, "--batch", "1", "2", "--json", str(file), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "stand_in" in said and "attention's share" in said
    document = json.loads(file.read_text())
    assert document["versions"]["transformers"] == "5.0"
    found = document["results"]
    assert [(r["passed"], r["batch"]) for r in found] == [(p, b) for b in (1, 2) for p in ("forward", "training")]
    for result in found:
        assert result["modules"] == 2
        for side in ("original", "accelerated"):
            assert result[side]["timing"]["median_us"] > 0
            assert 0.1 < result[side]["attention_share"] < 1
    assert "stand_in" in picture.read_text()

    assert main(["bench", "--clients", "--read", str(file), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| stand_in | float32 |") == 4


def test_half_precision_is_autocast(tmp_path):
    file = tmp_path / "figures.json"
    assert main([*BENCH, "--dtypes", "bfloat16", "--passes", "forward", "--json", str(file)]) == 0
    assert [r["dtype"] for r in json.loads(file.read_text())["results"]] == ["bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "float64"], "--dtypes of --clients are float32, float16, bfloat16; got float64"),
        (["--passes", "backward"], "--passes of --clients are forward, training; got backward"),
    ],
)
def test_what_clients_do_not_have(arguments, message, capsys):
    assert main([*BENCH, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_original_is_back(monkeypatch):
    model = Detector()
    monkeypatch.setattr(StandIn, "build", lambda self, device: model)
    assert main([*BENCH, "--passes", "forward"]) == 0
    assert type(model.first) is MSDeformAttn


def test_a_model_that_fails_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(StandIn, "inputs", lambda self, batch, device: {"pixel_values": torch.zeros(1, 3, 5, 6)})
    assert main(BENCH) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stand_in float32 batch 1 forward failed" in said and "nothing could be timed" in said


def test_without_the_package(monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(measure, "versions", missing)
    assert main(BENCH) == 2
    assert "pip install 'reimplementation[transformers]'" in capsys.readouterr().err
