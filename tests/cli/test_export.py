"""`export` writes files that compute what the modules do, and says so."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from reimplementation.cli import export, main

SMALL = ["--levels", "8x12", "4x6", "--channels=32", "--groups=4", "--points=3", "--cameras=2", "--queries=5"]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("onnx", "attention"),
        ("exported", "aggregation"),
        pytest.param("onnx", "aggregation", marks=pytest.mark.slow),
        pytest.param("aoti", "attention", marks=pytest.mark.slow),
    ],
)
def test_file(kind, module, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    output = tmp_path / f"file{export.FORMATS[kind].suffix}"
    state = torch.get_rng_state()
    assert main(["export", "--format", kind, "--module", module, *SMALL, str(output)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert output.stat().st_size > 0
    said = capsys.readouterr().out
    errors = re.findall(r"batch (\d), (\d) queries: (\S+)", said)
    assert [sizes[:2] for sizes in errors] == [("2", "5"), ("1", "6")]
    assert all(float(error) < 1e-5 for *_, error in errors)


def test_inputs_are_seen():
    """A check of samples that all fall outside would check nothing."""
    options = parsed("--format=exported", "--module=aggregation", *SMALL, "unused.pt2")
    torch.manual_seed(0)
    model = export.MODELS["aggregation"](options)
    model.module.output_proj = torch.nn.Identity()
    with torch.no_grad():
        seen = model.module(**model.inputs(2, 50)).abs().amax(-1) > 0
    assert seen.float().mean() > 0.4  # two cameras see half of what is around them


def test_a_file_that_computes_something_else_is_an_error(tmp_path, capsys, monkeypatch):
    wrong = export.Format(".pt2", export.FORMATS["exported"].write, lambda path: lambda inputs: torch.zeros(()))
    monkeypatch.setitem(export.FORMATS, "exported", wrong)
    output = tmp_path / "file.pt2"
    assert main(["export", "--format=exported", "--module=attention", *SMALL, str(output)]) == 2
    assert "does not compute what the module does: relative L2 error 1.0e+00" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=onnx", "a.pt2"], "the name of --format onnx ends in .onnx; got a.pt2"),
        (["--format=exported", "--groups=5", "a.pt2"], "--channels must be a multiple of --groups 5; got 256"),
        (["--format=exported", "--device=gpu", "a.pt2"], "--device must be cpu, cuda or cuda:N; got 'gpu'"),
        pytest.param(
            ["--format=exported", "--device=cuda", "a.pt2"],
            "--device cuda needs a PyTorch with CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA"),
        ),
    ],
)
def test_what_does_not_fit(arguments, message, capsys):
    assert main(["export", "--module=attention", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("level", ["64", "8by4", "8x0", "8x4x2"])
def test_a_level_is_two_numbers(level, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--module=attention", "--format=onnx", "--levels", level, "a.onnx"])
    assert f"expected rows and columns, such as 64x176; got '{level}'" in capsys.readouterr().err


def test_the_extra_is_named(tmp_path, capsys, monkeypatch):
    def write(*_):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setitem(export.FORMATS, "onnx", export.Format(".onnx", write, None))
    assert main(["export", "--module=attention", "--format=onnx", *SMALL, str(tmp_path / "a.onnx")]) == 2
    assert "onnxscript is missing; install it with: pip install 'reimplementation[export]'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_onnx_file_of_the_usual_size(tmp_path, monkeypatch):
    """One file, with the weights inside, that another folder's process reads."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert main(["export", "--format=onnx", "--module=aggregation", "--queries=50", "file.onnx"]) == 0
    assert [file.name for file in Path().iterdir()] == ["file.onnx"]
    monkeypatch.chdir(tmp_path)
    model = export.MODELS["aggregation"](parsed("--format=onnx", "--module=aggregation", "unused.onnx"))
    inputs = model.inputs(1, 33)
    assert export.FORMATS["onnx"].read(Path("there/file.onnx"))(inputs).shape == (1, 33, 256)


@pytest.mark.slow
def test_the_exporter_by_itself_at_the_usual_size(tmp_path, monkeypatch):
    """As people type it: the weights lie in a second file beside the first."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = export.MODELS["aggregation"](parsed("--format=onnx", "--module=aggregation", "unused.onnx"))
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    inputs, dynamic_shapes = model.inputs(2, 50), model.dynamic_shapes
    torch.onnx.export(model.module, (), "model.onnx", kwargs=inputs, dynamic_shapes=dynamic_shapes, dynamo=True)
    monkeypatch.chdir(tmp_path)
    inputs = model.inputs(1, 33)
    with torch.no_grad():
        expected = model.module(**inputs)
    output = export.FORMATS["onnx"].read(Path("there/model.onnx"))(inputs)
    assert (output - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
def test_a_package_refuses_other_sizes(tmp_path, monkeypatch):
    """Where it is asked to check them, as `export` asks; without, it reads beyond the end of what it was given."""
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    output = tmp_path / "file.pt2"
    command = ["--format=aoti", "--module=attention", *SMALL, str(output)]
    assert main(["export", *command]) == 0
    inputs = export.MODELS["attention"](parsed(*command)).inputs(2, 5)
    inputs["input_flatten"] = inputs["input_flatten"][:, :20].contiguous()
    with pytest.raises(RuntimeError, match="unmatched dim value at 1, expected: 120, but got: 20"):
        export.FORMATS["aoti"].read(output)(inputs)


def parsed(*command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    export.add_parser(parser.add_subparsers())
    return parser.parse_args(["export", *command])
