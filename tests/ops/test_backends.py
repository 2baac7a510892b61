"""Which backend runs, who may choose it, and what is said when it is missing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import backends
from reimplementation.ops.backends import native, triton
from reimplementation.ops.backends.backend import Missing
from tests.ops.inputs import random_inputs
from tests.ops.table import OPS

CPU = torch.device("cpu")
OP = "Deformable aggregation"


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    """No backend has been chosen and no warning been given yet."""
    monkeypatch.setattr(backends, "_best", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(native, "_gpus", {})
    monkeypatch.setattr(triton, "_answers", dict(triton._answers))


@pytest.fixture
def triton_is(monkeypatch):
    """Pretends that Triton is there, or that it is missing for a reason, beside a PyTorch with CUDA."""

    def pretend(missing: str | None) -> None:
        monkeypatch.setattr(triton, "_answers", {"triton": missing and Missing(missing)})
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return pretend


@pytest.fixture
def extension(monkeypatch):
    """Pretends that the extension is there, with kernels for some GPUs, or missing for a reason; and Triton is too."""

    def pretend(architectures: str = "", missing: str | None = None) -> None:
        monkeypatch.setattr(triton, "_answers", {"triton": Missing("there is no Triton")})
        reason = missing and Missing(missing, native.BUILD_COMMAND)
        monkeypatch.setattr(native, "_extension_missing", reason)
        monkeypatch.setattr(native, "_architectures", architectures)
        monkeypatch.setattr(native, "EXTENSION_AVAILABLE", reason is None)
        monkeypatch.setattr(native, "CUDA_EXT_AVAILABLE", bool(architectures))

    return pretend


@pytest.fixture
def no_extension(extension):
    extension(missing="no C++ compiler")


@pytest.fixture
def gpus(extension, monkeypatch):
    """Pretends that the extension is built for some architectures, and that there are GPUs of some capabilities."""

    def pretend(architectures: str, *capabilities: tuple[int, int]) -> list[int]:
        asked = []

        def capability(index: int) -> tuple[int, int]:
            asked.append(index)
            return capabilities[index]

        extension(architectures)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
        return asked

    return pretend


def test_the_best_backend_runs():
    assert backends.select_backend(CPU, OP) == ops.available_backends(CPU)[0]
    assert ops.available_backends("cpu")[-1] == "grid_sample"


def test_use_backend_forces_and_gives_back():
    before = backends.select_backend(CPU, OP)
    with ops.use_backend("grid_sample"):
        assert backends.select_backend(CPU, OP) == "grid_sample"
    assert backends.select_backend(CPU, OP) == before


def test_use_backend_is_the_asyncio_tasks_own():
    """Tasks take turns, two of them within blocks, which begin and end in one another."""

    async def chosen(name: str | None) -> list[str]:
        with ops.use_backend(name) if name else nullcontext():
            seen = []
            for _ in range(3):
                seen.append(backends.select_backend(CPU, OP))
                await asyncio.sleep(0)
        return [*seen, backends.select_backend(CPU, OP)]

    async def all_at_once() -> list[list[str]]:
        return await asyncio.gather(chosen("grid_sample"), chosen(best), chosen(None))

    best = ops.available_backends(CPU)[0]
    assert asyncio.run(all_at_once()) == [["grid_sample"] * 3 + [best], [best] * 4, [best] * 4]


def test_use_backend_without_with_says_so():
    with pytest.warns(RuntimeWarning, match=r"does nothing by itself: write `with use_backend\('grid_sample'\):`"):
        ops.use_backend("grid_sample")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ops.use_backend("grid_sample"):
            pass


def test_use_backend_decorates():
    @ops.use_backend("grid_sample")
    def chosen(depth: int) -> list[str]:
        return [backends.select_backend(CPU, OP), *(chosen(depth - 1) if depth else [])]

    assert chosen(2) == ["grid_sample"] * 3
    assert backends.select_backend(CPU, OP) == ops.available_backends(CPU)[0]


def test_a_compiled_function_follows_the_forced_backend():
    """Dynamo guards on it: a graph of one backend does not serve a call that forces another."""
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        outside = backends.select_backend(CPU, OP, in_graph=True) == "grid_sample"
        with ops.use_backend("grid_sample"):
            inside = backends.select_backend(CPU, OP, in_graph=True) == "grid_sample"
        return x + 2 * outside + inside

    is_best = ops.available_backends(CPU)[0] == "grid_sample"
    for _ in range(2):
        assert chosen(torch.zeros(1)).item() == 1 + 2 * is_best
        with ops.use_backend("grid_sample"):
            assert chosen(torch.zeros(1)).item() == 3


def test_a_device_without_kernels_is_not_told_to_build_them():
    assert backends.why_missing("mps") == "the extension is written for cpu and cuda, not for mps"


def test_import_is_quick_and_silent():
    """The compiler, which takes a second to import, is not imported before it is used."""
    code = "import sys, torch; import reimplementation.ops; print({'torch._dynamo', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, grid_sample; got 'nonsense'"),
        ops.use_backend("nonsense"),
    ):
        pass


def test_forcing_a_missing_backend(no_extension):
    message = "Deformable aggregation CUDA extension is not available: no C.. compiler. To build it: pip install"
    with pytest.raises(RuntimeError, match=message), ops.use_backend("cuda"):
        pass


def test_forcing_the_backend_of_another_device(extension):
    extension("9.0")
    with (
        pytest.raises(RuntimeError, match="backend 'cuda' is forced, but the tensors are on cpu"),
        ops.use_backend("cuda"),
    ):
        backends.select_backend(CPU, OP)


def test_the_first_fall_warns_once(no_extension, op):
    """And points to where the op was called; the numbers are the same."""
    operands = op.on("cpu", torch.float32)
    with pytest.warns(RuntimeWarning, match="running on grid_sample.*no C.. compiler.*pip install") as caught:
        actual = op.function(*operands)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op.function(*operands), actual)
    with ops.use_backend("grid_sample"):
        assert torch.equal(op.function(*operands), actual)


def test_build_info_names_what_is_missing(no_extension):
    info = ops.build_info()
    assert not info["cpu"] and not info["cuda"] and info["file"] is None
    assert info["reasons"] == {"cpu": "no C++ compiler", "cuda": "no C++ compiler"}


# The variable is read at import: one process imports PyTorch, and forks for every value.
CALLS_WITH_VARIABLE = """
import json, os, sys, torch

for value in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["REIMPLEMENTATION_BACKEND"] = value
        from tests.ops.agreement import KernelCalls
        from tests.ops.table import OPS

        for op in OPS:
            try:
                with KernelCalls() as calls:
                    op.function(*op.on("cpu", torch.float32))
                found = f"calls {calls.names}"
            except (ValueError, RuntimeError) as error:
                found = str(error)
            print(json.dumps([value, op.name, found]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_environment_variable():
    done = subprocess.run(
        [sys.executable, "-c", CALLS_WITH_VARIABLE, "grid_sample", "cuda", "nonsense"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = {(value, name): text for value, name, text in map(json.loads, done.stdout.splitlines())}
    for op in OPS:
        assert found["grid_sample", op.name] == "calls []"
        assert "backend must be one of" in found["nonsense", op.name]
        if not ops.CUDA_EXT_AVAILABLE:
            assert "CUDA extension is not available: " in found["cuda", op.name]
    forced = {text for (value, _), text in found.items() if value == "cuda"}
    assert ops.CUDA_EXT_AVAILABLE or len(forced) == len(OPS)  # each names its op


@pytest.mark.parametrize(
    "architectures, runs, does_not_run",
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),  # machine code: the same major, no lower minor
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),  # PTX: anything later
        ("9.0a", [(9, 0)], [(9, 1), (10, 0), (8, 9)]),
        ("9.0a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", [(7, 5), (8, 7), (9, 0), (10, 3), (12, 1), (13, 0)], [(7, 0), (11, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_which_gpus_run_which_code(architectures, runs, does_not_run):
    for capability in runs:
        assert native.runs_on(capability, architectures.split()), capability
    for capability in does_not_run:
        assert not native.runs_on(capability, architectures.split()), capability


UNFIT = (
    "cuda:0, Card 0, has compute capability 6.1, and the extension was built for 8.0 9.0+PTX. "
    "To build it: TORCH_CUDA_ARCH_LIST=6.1 pip install ."
)


def test_a_gpu_that_the_extension_was_not_built_for_runs_grid_sample(gpus):
    asked = gpus("8.0 9.0+PTX", (6, 1), (9, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.select_backend(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    assert chosen == ["grid_sample", "cuda", "grid_sample", "cuda"]
    assert [str(warning.message) for warning in caught] == [
        f"running on grid_sample, which is slower: no cuda kernels: {UNFIT}"
    ]
    assert asked == [0, 1]  # each GPU once
    assert ops.available_backends("cuda:0") == ["grid_sample"]
    assert ops.available_backends("cuda:1") == ["cuda", "grid_sample"]
    assert ops.available_backends("cuda") == ["grid_sample"]  # the current one
    assert backends.why_missing("cuda:0") == UNFIT and backends.why_missing("cuda:1") is None


def test_a_gpu_that_the_extension_was_not_built_for_runs_triton(gpus, triton_is):
    """Without a word: it is not much slower."""
    gpus("8.0", (8, 9), (9, 0), (6, 1))
    triton_is(missing=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = [backends.select_backend(torch.device("cuda", index)) for index in (0, 1)]
    assert chosen == ["cuda", "triton"]
    assert ops.available_backends("cuda:1") == ["triton", "grid_sample"] and backends.why_missing("cuda:1") is None
    assert ops.available_backends("cuda:0") == ["cuda", "triton", "grid_sample"]
    assert ops.available_backends("cuda:2") == ["grid_sample"] and "capability 6.1" in backends.why_missing("cuda:2")
    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match="has compute capability 6.1, and Triton needs 7.0"),
    ):
        backends.select_backend(torch.device("cuda:2"))


def test_triton_is_not_looked_for_where_the_extension_serves(gpus, triton_is, monkeypatch):
    gpus("9.0", (9, 0))
    triton_is(missing=None)
    monkeypatch.setattr(triton, "_why_not_triton", lambda: pytest.fail("it was imported"))
    assert backends.select_backend(torch.device("cuda:0")) == "cuda"


@pytest.mark.parametrize(
    ("module", "reason"),
    [(None, "Triton cannot be imported: .*pip install triton"), ("3.5.1", "Triton 3.5.1 is too old; .*'triton>=3.6'")],
)
def test_forcing_triton_where_it_is_missing(module, reason, triton_is, monkeypatch):
    triton_is(missing=None)
    monkeypatch.setattr(triton, "_answers", {})
    monkeypatch.setitem(sys.modules, "triton", module and types.SimpleNamespace(__version__=module))
    with pytest.raises(RuntimeError, match=f"TRITON backend is not available: {reason}"), ops.use_backend("triton"):
        pass


def test_triton_needs_a_gpu_unless_it_is_interpreted(triton_is, monkeypatch):
    triton_is(missing=None)
    with pytest.raises(RuntimeError, match="backend 'triton' is forced, but the tensors are on cpu: move them to cuda"):
        with ops.use_backend("triton"):
            backends.select_backend(CPU, OP)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.use_backend("triton"):
        assert backends.select_backend(CPU, OP) == "triton"
    assert "triton" not in ops.available_backends("cpu")  # it is never chosen
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="is a build without CUDA and ROCm"), ops.use_backend("triton"):
        pass


def test_cuda_may_be_forced_on_the_gpus_that_it_runs_on(gpus):
    gpus("8.0 9.0+PTX", (6, 1), (9, 0))
    with ops.use_backend("cuda"):
        assert backends.select_backend(torch.device("cuda:1")) == "cuda"
        with pytest.raises(RuntimeError) as error:
            backends.select_backend(torch.device("cuda:0"), OP)
        assert str(error.value) == f"{OP} CUDA extension is not available: {UNFIT}"
        with ops.use_backend("grid_sample"):
            assert backends.select_backend(torch.device("cuda:0")) == "grid_sample"


def test_cuda_cannot_be_forced_where_no_gpu_runs_it(gpus):
    gpus("8.0 9.0+PTX", (6, 1), (7, 5))
    with pytest.raises(RuntimeError, match="cuda:0, Card 0, has compute capability 6.1"), ops.use_backend("cuda"):
        pass


def test_without_a_gpu_no_capability_is_asked_for(gpus):
    asked = gpus("8.0")
    with ops.use_backend("cuda"):  # to trace with tensors that have no memory
        assert backends.select_backend(torch.device("cuda:0")) == "cuda"
    assert asked == []


def test_a_graph_asks_for_the_capability_while_it_is_traced(extension, monkeypatch):
    asked = []
    extension("9.0")
    monkeypatch.setattr(native, "_compare_with_gpu", asked.append)  # which returns None: the GPU is fit

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        return x + 1 if backends.select_backend(torch.device("cuda:0"), in_graph=True) == "cuda" else x

    assert chosen(torch.zeros(1)).item() == chosen(torch.zeros(1)).item() == 1
    assert asked == [0]


@pytest.mark.cuda
@pytest.mark.parametrize("architectures", ["5.0", "99.0+PTX"])
def test_an_unfit_gpu_computes_the_same_on_grid_sample(extension, architectures):
    extension(architectures)
    inputs = random_inputs()
    major, minor = torch.cuda.get_device_capability()
    with pytest.warns(RuntimeWarning, match=rf"compute capability {major}\.{minor}, .* built for {architectures[0]}"):
        output = ops.deformable_aggregation_function(*inputs.to("cuda", torch.float64))
    with ops.use_backend("grid_sample"):
        expected = ops.deformable_aggregation_function(*inputs)
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST="), ops.use_backend("cuda"):
        pass
