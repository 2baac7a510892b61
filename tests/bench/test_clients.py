"""`bench --clients` end to end, on a stand-in for a model of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from reimplementation.bench import timing
from reimplementation.bench.clients import measure, models
from reimplementation.bench.clients.sides import PEER, Runner, runners
from reimplementation.cli import main
from reimplementation.integrations.replacement import Accelerated
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
            share = result[side]["attention_share"]
            assert share is None if result["passed"] == "training" else 0.1 < share < 1
    assert "stand_in" in picture.read_text()

    other = tmp_path / "again.json"
    assert main([*BENCH, "--batch", "2", "--passes", "forward", "--json", str(other)]) == 0
    both = tmp_path / "both.json"
    assert main(["bench", "--clients", "--read", str(file), str(other), "--json", str(both)]) == 0
    again, joined = (json.loads(path.read_text())["results"] for path in (other, both))
    assert joined == [again[0] if (r["passed"], r["batch"]) == ("forward", 2) else r for r in found]
    capsys.readouterr()

    assert main(["bench", "--clients", "--read", str(file), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "In float32, batch 1:" in shown and "In float32, batch 2:" in shown
    rows = [line for line in shown.splitlines() if line.startswith("| stand_in |")]
    assert [row.count(" → ") for row in rows] == [4, 4]


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


def test_the_original_stays_what_it_is():
    model = Detector()
    sides = runners(model, peer=False)
    assert sides["original"].model is model and type(model.first) is MSDeformAttn
    assert sides["original"].attention == [model.first, model.second]
    assert all(isinstance(module, Accelerated) for module in sides["accelerated"].attention)


def test_attention_is_timed_without_hooks():
    """With one, a module would compute its attention weights too."""
    model, seen = Detector(), []
    forward = model.first.forward
    model.first.forward = lambda *arguments: seen.append(len(model.first._forward_hooks)) or forward(*arguments)
    runner = Runner(model, [model.first, model.second])
    step = measure._Step(runner, StandIn().inputs(1, "cpu"), torch.device("cpu"), "float32", "forward")
    assert 0 < measure._share(step, torch.device("cpu"), 3) < 1
    assert set(seen) == {0} and "forward" not in vars(model.second)


@pytest.fixture
def deformops(monkeypatch) -> Callable[[type[nn.Module]], None]:
    """Puts a package there with the interface of deformops 3, whose patch puts modules of a class into a detector."""

    def install(kind: type[nn.Module]) -> None:
        def patch(model, *, strict):
            assert not strict
            model.first = kind()
            return model

        modules = {"": None, ".integrations": None, ".integrations.transformers": patch}
        for name, function in modules.items():
            module = ModuleType(f"{PEER}{name}")
            module.patch = function
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(measure, "peer_version", lambda: {PEER: "3"})

    return install


class Theirs(MSDeformAttn):
    __module__ = f"{PEER}.nn"


class Broken(MSDeformAttn):
    __module__ = Theirs.__module__

    def forward(self, *arguments):
        raise AssertionError("not on this GPU")


def test_a_peer_that_knows_the_model_is_timed_too(deformops, tmp_path, capsys):
    deformops(Theirs)
    file = tmp_path / "figures.json"
    assert main([*BENCH, "--passes", "forward", "--peers", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["versions"][PEER] == "3"
    assert 0 < document["results"][0][PEER]["attention_share"] < 1
    assert "deformops, ms" in capsys.readouterr().out
    assert main(["bench", "--clients", "--read", str(file), "--markdown"]) == 0


@pytest.mark.parametrize(("kind", "said"), [(MSDeformAttn, None), (Broken, "failed: AssertionError: not on this GPU")])
def test_a_peer_that_does_not_serve_is_left_out(kind, said, deformops, tmp_path, capsys):
    deformops(kind)
    file = tmp_path / "figures.json"
    assert main([*BENCH, "--passes", "forward", "--peers", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["results"][0][PEER] is None
    assert said is None or said in " ".join(capsys.readouterr().err.split())


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PEER, None)
    assert main([*BENCH, "--passes", "forward", "--peers"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "deformops is left out: deformops.integrations is not installed; try: pip install deformops" in said


def test_what_was_measured_is_kept_when_a_run_ends_early(monkeypatch, tmp_path):
    class Interrupting(StandIn):
        def build(self, device):
            raise KeyboardInterrupt

    monkeypatch.setitem(models.MODELS, "interrupting", Interrupting())
    file = tmp_path / "figures.json"
    main([*BENCH, "interrupting", "--passes", "forward", "--json", str(file)])
    assert [r["model"] for r in json.loads(file.read_text())["results"]] == ["stand_in"]


def test_a_model_that_another_version_lacks_is_left_out(monkeypatch, tmp_path, capsys):
    class Missing(StandIn):
        def build(self, device):
            raise AttributeError("module transformers has no attribute MissingConfig")

    monkeypatch.setitem(models.MODELS, "missing", Missing())
    assert main([*BENCH[:-1], "missing", "stand_in", "--passes", "forward"]) == 0
    assert "missing float32 batch 1 forward failed: module transformers" in " ".join(capsys.readouterr().err.split())


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
