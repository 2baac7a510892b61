"""One op at five levels: that they compute the same, and what is said, drawn and kept of their figures."""

from __future__ import annotations

import io
import json
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.inputs import aggregation_inputs, attention_inputs
from reimplementation.bench.levels import catalogue, compiled, eager, extension, measure, picture, torchscript, triton
from reimplementation.cli import levels, main
from tests.markdown import ROOT
from tests.ops.table import AGGREGATION, ATTENTION
from tests.reference import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

SMALL = {
    "aggregation": partial(aggregation_inputs, num_queries=5, num_points=3, channels=16, strides=(32, 64)),
    "attention": partial(attention_inputs, "small-decoder"),
}


@pytest.fixture(params=SMALL)
def inputs(request):
    return SMALL[request.param](dtype=torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The file of figures that the command wrote on small inputs, and its exit code and what it said.

    There was no compiler, which would take most of a minute.
    """
    file = tmp_path_factory.mktemp("levels") / "figures.json"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(catalogue, "_CASES", {op: {"cpu": make} for op, make in SMALL.items()})
        patch.setattr(torch, "compile", lambda function, **settings: function)
        patch.setattr(levels, "copy_bandwidth", lambda device, repeats: 10.0)
        code = main(["levels", "--device", "cpu", "--repeats", "1", "--json", str(file)])
    return file, code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "prepare",
    [eager.prepare, torchscript.prepare, compiled.prepare, compiled.prepare_gathers, extension.prepare],
    ids=lambda prepare: f"{prepare.__module__.rpartition('.')[2]}.{prepare.__name__}",
)
def test_every_level_computes_the_same(prepare, inputs, monkeypatch):
    if prepare is extension.prepare and extension.why_not(torch.device("cpu")):
        pytest.skip("the CPU kernels are not built")
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    formula = {5: ATTENTION, 6: AGGREGATION}[list(inputs)[4].dim()].formula
    features, shapes, starts, locations, weights = inputs
    leaves = [tensor.requires_grad_() for tensor in (features, locations, weights)]
    actual, expected = prepare(inputs)(*leaves), formula(features, shapes, starts, locations, weights)
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, wanted in zip(
        [actual, *torch.autograd.grad(actual, leaves, toward)],
        [expected, *torch.autograd.grad(expected, leaves, toward)],
    ):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float64]


@pytest.mark.slow
def test_level_3_compiles(inputs):
    expected = eager.prepare(inputs)(*[list(inputs)[i] for i in (0, 3, 4)])
    for prepare in (compiled.prepare, compiled.prepare_gathers):
        actual = prepare(inputs)(*[list(inputs)[i] for i in (0, 3, 4)])
        torch.testing.assert_close(actual, expected)


def test_the_command(run):
    """Every level has its figures, or the reason why it is not there; TorchScript's warning is shown."""
    file, code, out, err = run
    assert code == 0
    found = json.loads(file.read_text())["results"]
    assert [(figure["op"], figure["level"]) for figure in found] == [
        (op, level) for op in ("aggregation", "attention") for level in (1, 2, 3, 3, 4, 5)
    ]
    has_kernels = "cpu" in ops.available_backends("cpu")
    for figure in found:
        is_there = figure["level"] < 4 or (figure["level"] == 5 and has_kernels)
        assert (figure["missing"] == "-") == is_there == bool(figure["passes"])
        if is_there:
            assert [passed["name"] for passed in figure["passes"]] == ["forward", "training"]
            assert all(passed["call_us"] > 0 and passed["kernels"] for passed in figure["passes"])
            assert 0 < figure["max_error"] < 1e-4 and figure["mean_error"] <= figure["max_error"]
            assert figure["lines"] > 5 and figure["gathered_bytes"] > 0
    assert "4 Triton is not there: Triton compiles kernels for GPUs." in out
    assert "`torch.jit.script` is deprecated" in err
    said = [line.partition(":")[0] for line in err.splitlines() if line.endswith(" s")]
    assert said == [f"{figure['op']}, level {figure['level']}, {figure['name']}" for figure in found]


def test_figures_are_read_and_drawn(run, tmp_path, capsys):
    file, _, out, _ = run
    drawn = tmp_path / "levels.png"
    assert main(["levels", "--read", str(file), "--picture", str(drawn)]) == 0
    assert capsys.readouterr().out == out
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("triton_red_fused_add_grid_sampler_2d_mul_sum_view_3", "Inductor: grid_sample, sum"),
        ("triton_poi_fused_expand_gather_where_3", "Inductor: gather"),
        ("triton_poi_fused_mul_new_zeros_scatter_add_1", "Inductor: scatter"),
        ("triton_per_fused_mul_sum_view_0", "Inductor: arithmetic, sum"),
        ("fused_mul_sub", "fused_mul_sub"),
    ],
)
def test_what_a_legend_calls_a_kernel(name, label):
    assert picture._label(name) == label


def test_the_name_of_a_kernel_in_no_namespace():
    name = "void at::native::(anonymous namespace)::grid_sampler_2d_kernel<float, int>(at::Tensor, float*)"
    assert measure._short(name) == "at::native::grid_sampler_2d_kernel"


def test_a_file_from_elsewhere(run, tmp_path, capsys):
    document = json.loads(run[0].read_text())
    file = tmp_path / "changed.json"
    for key, value, message in [
        ("passes", 3, "passes must be a list"),
        ("lines", "many", "lines must be"),
        ("max_error", float("nan"), "max_error must be"),
        ("missing", "\x1b[31m", "missing must be 1 to 200 printable characters"),
    ]:
        changed = {**document, "results": [{**document["results"][0], key: value}]}
        file.write_text(json.dumps(changed))
        assert main(["levels", "--read", str(file)]) == 2
        assert message in capsys.readouterr().err


def test_one_op(monkeypatch):
    asked = []
    monkeypatch.setattr(levels, "copy_bandwidth", lambda device, repeats: 10.0)
    monkeypatch.setattr(levels, "measure_all", lambda op, *others: asked.append(op) or [])
    assert main(["levels", "--device", "cpu", "--op", "attention"]) == 0
    assert asked == ["attention"]


def test_a_level_that_takes_too_long(monkeypatch):
    """It is left out, and nothing rings afterwards."""
    slow = replace(catalogue.LEVELS[0], prepare=lambda inputs: time.sleep(60))
    monkeypatch.setattr(measure, "LEVELS", (slow, slow))
    monkeypatch.setattr(catalogue, "_CASES", {"attention": {"cpu": SMALL["attention"]}})
    for figure in measure.measure_all("attention", torch.device("cpu"), 1, limit=0.1):
        assert (figure.missing, figure.passes) == ("it took longer than 0.1 s", [])
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_triton_is_a_level_where_it_compiles(monkeypatch):
    assert triton.why_not(torch.device("cpu")) == "Triton compiles kernels for GPUs"
    monkeypatch.setattr(ops.backends, "why_not", lambda name, device: f"{name} is not there")
    assert triton.why_not(torch.device("cuda:0")) == "triton is not there"


def test_the_committed_page_is_what_the_command_writes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["levels", "--page", "benchmarks/levels"]) == 0
    page = (ROOT / "docs" / "levels.md").read_text()
    written = "python -m reimplementation levels --page benchmarks/levels"
    assert capsys.readouterr().out == page, f"write it again: {written}"
    assert f"{written} > docs/levels.md" in page


def test_a_folder_without_figures(tmp_path, capsys):
    assert main(["levels", "--page", str(tmp_path)]) == 2
    assert f"there are no figures in {tmp_path}" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("op", SMALL)
def test_on_a_gpu(op, monkeypatch):
    """Kernels are counted, and the graph's time is the GPU's alone."""
    monkeypatch.setattr(catalogue, "_CASES", {op: {"cuda": SMALL[op]}})
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    for figure in measure.measure_all(op, torch.device("cuda"), 2, limit=60):
        for passed in figure.passes:
            assert passed.launches > 0 and passed.kernels and passed.host_us > 0
            assert passed.graph_us is None or passed.graph_us < passed.call_us
