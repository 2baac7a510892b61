"""What the ViT's benchmark counts and times."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import pytest
import torch

from reimplementation.bench import results, vit, vit_tables
from reimplementation.bench.timing import Timing
from reimplementation.models.backbones.vit import HeadConfig, ViTConfig
from tests.markdown import ROOT

CPU = torch.device("cpu")
CONFIG = ViTConfig(3, (8, 8), (16, 24), 2, 16, 32, 2, num_cls_tokens=1, dtype=torch.float32, heads={"a": HeadConfig()})
FIGURE = vit.Figure("vit", 4, "16x24", "forward", "eager", "float32", Timing(2000.0, 10.0, "wall"), 3.0, 5_000_000)


@pytest.mark.parametrize("activation", ["srelu", "swiglu"])
def test_operations(activation):
    """Two for each product and sum: patches, then queries to the MLP of each layer."""
    tokens, channels, ffn = 7, 16, 32
    fc1 = ffn * (2 if activation == "swiglu" else 1)
    layer = tokens * (4 * channels**2 + (fc1 + ffn) * channels) + 2 * tokens**2 * channels
    forward = 2 * (6 * 3 * 64 * channels + CONFIG.depth * layer)
    candidate = vit.vit_candidate("vit", CONFIG.replace(activation=activation, activation_checkpointing=True))
    assert vit.count_flops(candidate, (16, 24)) == forward
    backward = vit.count_flops(candidate, (16, 24), "backward")
    # Both operands of every product have a gradient, but the image has none.
    assert backward == 2 * forward - 2 * 6 * 3 * 64 * channels
    assert vit.count_flops(candidate, (16, 24), "forward_backward") == forward + backward


@pytest.mark.parametrize("pos_enc", ["fourier", "learnable", "none"])
def test_operations_of_every_position_encoding(pos_enc):
    """Only Fourier's has a product; PyTorch's counter stumbled over learned positions, a parameter as an output."""
    counts = [
        vit.count_flops(vit.vit_candidate("vit", CONFIG.replace(pos_enc=kind)), (16, 24)) for kind in ("rope", pos_enc)
    ]
    patches, channels = 6, 16
    products = patches * channels * (2 // 2) + patches * channels**2  # of two coordinates, and the linear layer
    assert counts[1] - counts[0] == (2 * products if pos_enc == "fourier" else 0)


@pytest.mark.parametrize("passed", vit.PASSES)
def test_a_pass(passed):
    candidate = vit.vit_candidate("vit", CONFIG)
    figure = vit.measure_candidate(candidate, (16, 16), 3, passed, "eager", CPU, repeats=2)
    assert (figure.config, figure.image_size, figure.batch_size, figure.dtype) == ("vit", "16x16", 3, "float32")
    assert figure.timing.median_us > 0
    assert figure.gflops == 3 * vit.count_flops(candidate, (16, 16), passed) / 1e9


def test_every_combination_and_what_fails():
    found = dict(
        vit.measure_all([vit.vit_candidate("a", CONFIG)], [(16, 16), (20, 16)], [1, 2], ["forward"], ["eager"], CPU, 1)
    )
    assert list(found) == [f"a {batch} x {size} forward eager" for size in ("16x16", "20x16") for batch in (1, 2)]
    assert [type(value) for value in found.values()] == [vit.Figure] * 2 + [ValueError] * 2


def test_another_dtype():
    model = vit.vit_candidate("vit", CONFIG.replace(dtype=torch.bfloat16)).build((16, 16))
    assert model(torch.zeros(1, 3, 16, 16)).dtype == torch.bfloat16


def test_derived_numbers():
    assert FIGURE.throughput == 2000 and FIGURE.tflops_per_s == 1.5


def test_csv(tmp_path):
    vit.write_csv(tmp_path / "figures.csv", [FIGURE])
    (row,) = csv.DictReader((tmp_path / "figures.csv").open())
    assert row["config_name"] == "vit" and float(row["latency_ms"]) == 2 and float(row["memory_mb"]) == 5
    assert float(row["throughput"]) == 2000


def test_json_is_read_back(tmp_path):
    document = results.describe(CPU, [FIGURE])
    document.write(tmp_path / "figures.json")
    assert results.read_one(tmp_path / "figures.json", vit.Figure) == document


def test_tables():
    """A share of the peak where that is known; of a figure that two parts have, the last."""
    document = replace(results.describe(CPU, [FIGURE]), machine={"device": "NVIDIA H200", "threads": 1})
    half = replace(FIGURE, dtype="bfloat16", config="half", gflops=989.0)
    again = replace(FIGURE, timing=Timing(3000.0, 1.0, "wall"))
    joined = vit_tables.joined([document, replace(document, results=[half, again])])
    said = vit_tables.markdown(joined)
    assert "| 4 x 16x24 | forward, eager |" in said and "| vit | 3 |" in said and "| half | 2 (50%) |" in said
    with pytest.raises(ValueError, match="of different versions"):
        vit_tables.joined([document, replace(document, versions={"torch": "1.0"})])
    with pytest.raises(ValueError, match="of different machines"):
        vit_tables.joined([document, replace(document, machine={"device": "another"})])


def test_the_page_has_the_committed_figures():
    document = results.read_one(ROOT / "benchmarks" / "vit" / "nvidia-h200.json", vit.Figure)
    assert vit_tables.markdown(document) in (ROOT / "docs" / "vit.md").read_text()


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from reimplementation.bench.vit_plots import draw_all

    paths = draw_all(tmp_path, results.describe(CPU, [FIGURE]), ["png", "svg"], dpi=50)
    assert [path.name for path in paths] == [
        f"benchmark_{name}.{kind}" for name in ("latency", "memory", "gflops", "throughput") for kind in ("png", "svg")
    ]
    assert all(path.stat().st_size for path in paths)


def test_latency():
    calls = []
    latency = vit.measure_latency(lambda: calls.append(1), CPU, warmup=2, iterations=5)
    assert len(calls) == 8  # once more for the memory
    assert 0 <= latency.min_ms <= latency.mean_ms <= latency.max_ms and latency.std_ms >= 0


def test_timm_is_asked_for_the_same_size(monkeypatch):
    asked = {}

    class Timm:
        @staticmethod
        def create_model(name, **settings):
            asked.update(settings, name=name)
            return torch.nn.Conv2d(3, 4, 8)

    monkeypatch.setitem(sys.modules, "timm", Timm)
    candidate = vit.timm_candidate("vit_small_patch16_224", torch.bfloat16)
    assert candidate.build((16, 32)).weight.dtype == torch.bfloat16
    assert asked == {"name": "vit_small_patch16_224", "img_size": (16, 32), "num_classes": 0, "global_pool": ""}


@pytest.mark.slow
def test_a_compiled_backward_runs_again_and_again():
    figure = vit.measure_candidate(
        vit.vit_candidate("vit", CONFIG), (16, 16), 2, "backward", "compiled", CPU, repeats=2
    )
    assert figure.mode == "compiled" and figure.timing.median_us > 0
