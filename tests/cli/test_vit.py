"""The `vit` commands: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reimplementation import cli
from reimplementation.models.backbones.vit import ViTConfig
from reimplementation.models.backbones.vit.initialization import wake_branches

pytest.importorskip("yaml")

EXAMPLES = Path(__file__).parents[2] / "examples" / "vit"
HEADS = str(EXAMPLES / "heads.yaml")
SMALL = """
type: ViT
in_channels: 3
patch_size: [8, 8]
img_size: [16, 24]
depth: 1
hidden_size: 16
ffn_hidden_size: 16
num_attention_heads: 2
dtype: float32
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def facts(capsys, *arguments) -> dict:
    assert cli.main(["vit", *map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


class TestValidate:
    @pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
    def test_examples(self, path, capsys):
        assert facts(capsys, "validate", path)["valid"]

    def test_text(self, capsys):
        assert cli.main(["vit", "validate", HEADS]) == 0
        said = capsys.readouterr().out
        assert "valid: yes" in said and "patch size: 16 x 16" in said and "  image: AttentivePoolHead" in said

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("depth: 0", "depth must be at least 1; got 0"),
            ("deep: 3", "unknown key 'deep'"),
            ("mlp_bias: 3", "mlp_bias must be true or false; got 3"),
            ("heads: {a: {type: Head, out_features: -1}}", "heads.a: out_features must be at least 1"),
        ],
    )
    def test_what_is_wrong(self, change, message, tmp_path, capsys):
        path = tmp_path / "wrong.yaml"
        path.write_text(SMALL + change)
        assert cli.main(["vit", "validate", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith(f"reimplementation: {path}: ")
        assert cli.main(["vit", "validate", str(path), "--format", "json"]) == 2
        found = json.loads(capsys.readouterr().out)
        assert not found["valid"] and message in found["error"]

    def test_a_missing_file(self, capsys):
        assert cli.main(["vit", "validate", "no-such.yaml"]) == 2
        assert "no-such.yaml" in capsys.readouterr().err


class TestSummarize:
    def test_vit_b(self, capsys):
        found = facts(capsys, "summarize", EXAMPLES / "vit_b16.yaml")
        assert found["parameters"]["total"] == 85_627_392
        assert found["memory"]["weight_bytes"] == 2 * 85_627_392
        assert found["compute"]["forward_gflops_per_image"] == pytest.approx(34.94, abs=0.005)

    def test_text(self, capsys):
        assert cli.main(["vit", "summarize", HEADS]) == 0
        said = capsys.readouterr().out
        assert "sequence length: 28" in said and "    pixels: " in said


class TestInfer:
    def test_random_images(self, config, capsys):
        found = facts(capsys, "infer", config, "--batch-size", 2, "--iterations", 2, "--warmup", 1)
        assert found["input_shape"] == [2, 3, 16, 24] and found["output_shape"] == [2, 6, 16]
        assert found["latency_ms"]["min"] <= found["latency_ms"]["mean"] <= found["latency_ms"]["max"]
        assert found["dtype"] == "float32" and found["weights"] == "random"

    def test_files(self, config, capsys, tmp_path):
        model = ViTConfig.from_yaml(config).instantiate().eval()
        wake_branches(model)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        images = np.random.default_rng(0).normal(size=(1, 3, 32, 16)).astype(np.float32)
        np.save(tmp_path / "images.npy", images)
        files = ("--weights", tmp_path / "weights.pt", "--input", tmp_path / "images.npy")
        facts(capsys, "infer", config, *files, "--output", tmp_path / "out.npy", "--iterations", 1)
        expected = model(torch.from_numpy(images)).dense_features
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected)

    def test_the_same_random_numbers_every_time(self, config, capsys):
        first, second = (facts(capsys, "infer", config, "--iterations", 1)["output_mean"] for _ in range(2))
        assert first == second

    def test_another_dtype(self, config, capsys):
        found = facts(capsys, "infer", config, "--dtype", "bfloat16", "--iterations", 1)
        assert found["dtype"] == "bfloat16" and found["latency_ms"]["std"] is None

    def test_a_volume(self, capsys):
        found = facts(capsys, "infer", EXAMPLES / "volume.yaml", "--iterations", 1, "--warmup", 1)
        assert found["output_shape"] == [1, 64, 64]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "a.pt2"], "there is no package a.pt2; write it with: python -m reimplementation vit export"),
            (["--model", "a.pt2", "--weights", "b.pt"], "give --model or --weights, not both"),
            (["--input", "a.png"], "ends in .npy or .pt; got a.png"),
            (["--output", "a.png", "--iterations", "1"], "ends in .npy or .pt; got a.png"),
        ],
    )
    def test_what_does_not_fit(self, arguments, message, config, capsys):
        assert cli.main(["vit", "infer", config, *arguments]) == 2
        assert message in capsys.readouterr().err


class TestBenchmark:
    def test_files(self, config, capsys, tmp_path):
        pytest.importorskip("rich")
        pytest.importorskip("matplotlib")
        folder = tmp_path / "figures"
        sizes = ("--resolutions", "16x24", "8,16", "20x8", "--repeats", 1)
        found = facts(capsys, "benchmark", config, *sizes, "--output-dir", folder, "--dpi", 40)
        assert [figure["image_size"] for figure in found["results"]] == ["16x24", "8x16"]
        assert {path.name for path in folder.iterdir()} == {
            "benchmark_results.csv",
            "benchmark_results.json",
            *(f"benchmark_{name}.png" for name in ("latency", "memory", "gflops", "throughput")),
        }

    def test_table(self, config, capsys):
        pytest.importorskip("rich")
        assert cli.main(["vit", "benchmark", config, "--repeats", "1"]) == 0
        said = capsys.readouterr()
        assert "1 x 16x24" in said.out and "small 1 x 16x24 forward eager: " in said.err

    def test_files_that_are_read(self, config, capsys, tmp_path):
        pytest.importorskip("rich")
        folder = tmp_path / "figures"
        facts(capsys, "benchmark", config, "--repeats", 1, "--output-dir", folder, "--no-plots")
        files = [str(folder / "benchmark_results.json")] * 2
        assert cli.main(["vit", "benchmark", "--read", *files, "--markdown"]) == 0
        assert "| 1 x 16x24 | forward, eager |" in capsys.readouterr().out
        for wrong in ([], [config, "--read", files[0]]):
            assert cli.main(["vit", "benchmark", *wrong]) == 2
            assert "give configurations to time, or files to --read" in capsys.readouterr().err

    def test_nothing_timed(self, config, capsys):
        pytest.importorskip("rich")
        assert cli.main(["vit", "benchmark", config, "--resolutions", "20x20"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "failed: img_size must be a positive multiple" in said and "nothing was timed" in said

    @pytest.mark.parametrize("size", ["224", "axb", "1x2x3x4", "0x16"])
    def test_no_size(self, size, config, capsys):
        with pytest.raises(SystemExit):
            cli.main(["vit", "benchmark", config, "--resolutions", size])
        assert "expected" in capsys.readouterr().err


class TestExport:
    def test_another_ending(self, config, capsys):
        assert cli.main(["vit", "export", config, "a.onnx"]) == 2
        assert "the name of a package ends in .pt2; got a.onnx" in capsys.readouterr().err

    @pytest.mark.slow
    def test_export_and_infer(self, config, capsys, tmp_path):
        package, images = tmp_path / "small.pt2", tmp_path / "images.npy"
        found = facts(capsys, "export", config, package)
        assert max(found["relative_l2_error"].values()) < 1e-5
        np.save(images, np.random.default_rng(0).normal(size=(3, 3, 16, 24)).astype(np.float32))
        outputs = []
        for name, model in (("a.npy", []), ("b.npy", ["--model", package])):
            facts(capsys, "infer", config, *model, "--input", images, "--output", tmp_path / name, "--iterations", 1)
            outputs.append(np.load(tmp_path / name))
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
        np.save(images, np.zeros((1, 3, 8, 8), np.float32))
        assert cli.main(["vit", "infer", config, "--model", str(package), "--input", str(images)]) == 2
        assert "a package takes images of its own size" in capsys.readouterr().err
