"""Files of the ops and modules: exported programs, AOTInductor packages in Python and C++, ONNX."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from reimplementation import ops
from tests.models.table import AGGREGATION, AGGREGATION_OF_MAPS, ATTENTION, CALLS
from tests.ops.table import FEATURE_AGGREGATION, OPS, SAMPLING_OPS, without_optional
from tests.reference import TOLERANCE, relative_error

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "aot_cpp"
BATCH, BOTH = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
METAS = {"projection_mat": BATCH, "image_wh": BATCH}
DYNAMIC = {  # which sizes of the arguments may vary: batch and queries
    AGGREGATION_OF_MAPS: (BOTH, BOTH, BOTH, [BATCH, BATCH], METAS),
    AGGREGATION: (BOTH, BOTH, BOTH, [BATCH, None, None], METAS),
    ATTENTION: (BOTH, BOTH, BATCH, None, None),
}
SIZES = ((2, 5), (3, 9), (1, 1))  # batch, queries; the first is the one that an exporter sees

every_call = pytest.mark.parametrize("case", CALLS, ids=str)
needs_kernels = pytest.mark.skipif("cpu" not in ops.available_backends("cpu"), reason="the CPU kernels are not built")


class Op(torch.nn.Module):
    """An op as a module, which is what exporters take."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *operands):
        return self.function(*operands)


def call_of(case, batch: int, queries: int) -> tuple:
    return case.arguments(*case.operands(batch_size=batch, num_queries=queries))


@lru_cache
def exported(case, backend: str):
    """The module, and its exported program, while that backend is forced."""
    module = case.trained().eval()
    with ops.use_backend(backend):
        return module, torch.export.export(module, call_of(case, *SIZES[0]), dynamic_shapes=DYNAMIC[case])


@every_call
@pytest.mark.parametrize("backend", ["cpu", "grid_sample"])
def test_exported_program(backend, case):
    if backend not in ops.available_backends("cpu"):
        pytest.skip("the CPU kernels are not built")
    module, program = exported(case, backend)
    ours = [node for node in program.graph.nodes if str(node.target).startswith("reimplementation.")]
    assert len(ours) == (backend == "cpu")
    for sizes in SIZES:
        call = call_of(case, *sizes)
        assert relative_error(program.module()(*call), module(*call)) <= TOLERANCE[torch.float32]


@needs_kernels
@pytest.mark.parametrize("op", OPS, ids=str)
def test_exported_op(op):
    """A sampling op's kernel is one node; others are made of standard operators."""
    seen, *others = (tuple(op.on("cpu", torch.float32, batch_size=b, num_queries=q)) for b, q in SIZES)
    varies = [
        {dim: Dim.DYNAMIC for dim in range(2) if dim < a.dim() and a.shape[dim] != b.shape[dim]}
        for a, b in zip(seen, others[0])
    ]
    program = torch.export.export(Op(op.function), seen, dynamic_shapes=(tuple(varies),))
    ours = [node for node in program.graph.nodes if str(node.target).startswith("reimplementation.")]
    assert len(ours) == (not op.is_pointwise)
    for operands in (seen, *others):
        assert relative_error(program.module()(*operands), op.function(*operands)) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", [op for op in OPS if op.is_pointwise], ids=str)
def test_traced_to_standard_operators(op):
    operands = op.on("cpu", torch.float32)
    traced = torch.jit.trace(op.function, operands)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    torch.testing.assert_close(traced(*operands), op.function(*operands))


@every_call
@pytest.mark.parametrize("backend", ["cpu", "grid_sample"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_trace(backend, case):
    """TorchScript by tracing: any batch and number of queries, the levels as they were."""
    if backend not in ops.available_backends("cpu"):
        pytest.skip("the CPU kernels are not built")
    module = case.trained().eval()
    with ops.use_backend(backend):
        traced = torch.jit.trace(module, call_of(case, *SIZES[0]), strict=False)
    for sizes in SIZES:
        call = call_of(case, *sizes)
        assert relative_error(traced(*call), module(*call)) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_script(case):
    """An error, and no module that computes something else."""
    with pytest.raises((RuntimeError, ValueError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(case.trained().eval())


class TestOnnx:
    @pytest.fixture(autouse=True)
    def quiet_exporter(self):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")

    @staticmethod
    def convert(module, arguments: tuple, dynamic_shapes):
        """The file's contents, and the numbers of its nodes by type."""
        names = ("instance_feature", "anchor", "anchor_embed", "feature_maps", "metas")
        if isinstance(arguments[-1], dict):  # torch.onnx.export takes a last dict for keyword arguments
            given, shapes = {"args": (), "kwargs": dict(zip(names, arguments))}, dict(zip(names, dynamic_shapes))
        else:
            given, shapes = {"args": arguments}, dynamic_shapes
        model = torch.onnx.export(module, **given, dynamic_shapes=shapes, dynamo=True, verbose=False).model_proto
        assert {imported.domain for imported in model.opset_import} == {""} and not model.functions
        return model.SerializeToString(), [node.op_type for node in model.graph.node]

    @staticmethod
    def run(contents: bytes | Path, arguments: tuple) -> torch.Tensor:
        import onnxruntime

        session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
        names = [argument.name for argument in session.get_inputs()]
        return torch.from_numpy(session.run(None, dict(zip(names, [t.numpy() for t in tree_leaves(arguments)])))[0])

    @every_call
    def test_modules(self, case):
        module = case.trained().eval()
        with ops.use_backend(ops.available_backends("cpu")[0]):  # a forced kernel does not stand in the way
            contents, nodes = self.convert(module, call_of(case, *SIZES[0]), DYNAMIC[case])
        # Two levels; where the shapes of the two cameras are not known, they cannot share a node.
        assert nodes.count("GridSample") == {AGGREGATION_OF_MAPS: 2, AGGREGATION: 4, ATTENTION: 2}[case]
        for sizes in SIZES:
            call = call_of(case, *sizes)
            with torch.no_grad():
                assert relative_error(self.run(contents, call), module(*call)) <= 1e-5

    @pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)
    def test_ops(self, op):
        features, shapes, starts, locations, weights = op.moved(op.geometries["border"](), "cpu", torch.float32)
        seen = features, shapes, starts, locations[:, :5], weights[:, :5]
        contents, nodes = self.convert(
            Op(op.function).eval(), seen, ((None, None, None, {1: Dim.DYNAMIC}, {1: Dim.DYNAMIC}),)
        )
        assert nodes.count("GridSample") == starts.numel()
        for arguments in (seen, (features, shapes, starts, locations, weights)):
            assert relative_error(self.run(contents, arguments), op.function(*arguments)) <= 1e-5

    @pytest.mark.slow
    @pytest.mark.parametrize("optional", [True, False])
    def test_feature_aggregation(self, optional):
        """Key points, softmax and dropped pairs are standard operators, too; the number of queries stays open."""
        op, varies = FEATURE_AGGREGATION, ("key_points", "logits", "keep")
        few, more = (op.on("cpu", torch.float32, 3, num_queries=queries) for queries in (5, 9))
        seen, others = (tuple(t if optional else without_optional(op, t)) for t in (few, more))
        dynamic_shapes = [
            {1: Dim.DYNAMIC} if name in varies and t is not None else None for name, t in zip(op.names, seen)
        ]
        contents, nodes = self.convert(Op(op.function).eval(), seen, (tuple(dynamic_shapes),))
        assert nodes.count("GridSample") == seen[2].numel()
        for operands in (seen, others):
            given = tuple(t for t in operands if t is not None)
            assert relative_error(self.run(contents, given), op.function(*operands)) <= 1e-5

    @pytest.mark.slow
    def test_maps_of_any_size(self):
        case = AGGREGATION_OF_MAPS
        module, any_map = case.trained().eval(), {0: Dim.DYNAMIC, 3: Dim.DYNAMIC, 4: Dim.DYNAMIC}
        dynamic_shapes = (*DYNAMIC[case][:3], [any_map, any_map], METAS)
        contents, _ = self.convert(module, call_of(case, 2, 5), dynamic_shapes)
        *others, levels, metas = call_of(case, 2, 6)
        smaller = (*others, [level[..., 1:, :-3].contiguous() for level in levels], metas)
        with torch.no_grad():
            assert relative_error(self.run(contents, smaller), module(*smaller)) <= 1e-5

    def test_a_file_of_many_levels(self, tmp_path, monkeypatch):
        """More levels than a file's constants hold by themselves; the file is read from another folder."""
        shapes, num_cams = [(4, 6), (2, 3)], 17

        class Aggregation(torch.nn.Module):
            def forward(self, maps, locations, weights):
                return ops.deformable_aggregation_function(*ops.feature_maps_format(maps), locations, weights)

        def call(batch, queries):
            generator = torch.Generator().manual_seed(queries)
            maps = [torch.randn(batch, num_cams, 8, *shape, generator=generator) for shape in shapes]
            locations = torch.rand(batch, queries, 2, num_cams, 2, generator=generator)
            return maps, locations, torch.rand(batch, queries, 2, num_cams, len(shapes), 2, generator=generator)

        module, folder = Aggregation().eval(), tmp_path / "there"
        folder.mkdir()
        monkeypatch.chdir(folder)
        dynamic_shapes = ([BATCH] * len(shapes), BOTH, BOTH)
        torch.onnx.export(module, call(2, 5), "model.onnx", dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False)
        monkeypatch.chdir(tmp_path)
        for sizes in SIZES:
            output = self.run(folder / "model.onnx", call(*sizes))
            assert relative_error(output, module(*call(*sizes))) <= 1e-5


@pytest.fixture(scope="module", params=[AGGREGATION_OF_MAPS, ATTENTION], ids=str)
def package(request, tmp_path_factory) -> tuple[Path, list, torch.Tensor]:
    """An AOTInductor package with our kernels, inputs other than those it was made from, and their output."""
    folder = tmp_path_factory.mktemp("package")
    module, program = exported(request.param, "cpu")
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    call = call_of(request.param, 3, 9)
    torch.save(tree_leaves(call), folder / "inputs.pt")
    torch.save(call, folder / "call.pt")
    with torch.no_grad():
        return folder, module(*call)


@pytest.mark.slow
@needs_kernels
def test_package_in_a_process_of_torch_alone(package):
    folder, expected = package
    code = (
        "import sys, torch; library, folder = sys.argv[1:]; torch.ops.load_library(library)\n"
        "model = torch._inductor.aoti_load_package(folder + '/model.pt2')\n"
        "torch.save(model(*torch.load(folder + '/call.pt')), folder + '/outputs.pt')\n"
        "assert 'reimplementation' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, ops.build_info()["file"], str(folder)], check=True, cwd=folder)
    assert relative_error(torch.load(folder / "outputs.pt"), expected) <= TOLERANCE[torch.float32]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The C++ example's folder, after what its README has people type there."""
    if shutil.which("make") is None or (shutil.which("c++") or shutil.which("g++")) is None:
        pytest.skip("needs make and a C++ compiler")
    folder = tmp_path_factory.mktemp("aot_cpp")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run_package", "*.pt", "*.pt2"))
    _as_typed(folder, 0)
    return folder


def _as_typed(folder: Path, recipe: int) -> str:
    """Run a block of commands of the README beside the program; what it prints."""
    commands = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)[recipe]
    commands = commands.replace("../vit/", f"{EXAMPLE.parent}/vit/")
    there = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(
        ["sh", "-e", "-c", commands], cwd=folder, env=os.environ | there, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.slow
@needs_kernels
def test_the_example_as_its_readme_types_it(example):
    (output,) = torch.load(example / "outputs.pt")
    assert output.shape == (1, 900, 64) and output.isfinite().all() and output.std() > 0


@pytest.mark.slow
@needs_kernels
def test_a_vit_as_the_readme_types_it(example):
    """Without operators, from and to NumPy's files, and equal to what Python computes."""
    pytest.importorskip("yaml")
    said = _as_typed(example, 1)
    assert "input 0: [2, 3, 64, 96] float32\noutput 0: [2, 28, 64] float32, mean " in said
    assert re.search(r"latency, ms, of 10 runs: mean [\d.e+-]+, std [\d.e+-]+, min [\d.e+-]+, max [\d.e+-]+\n", said)
    assert re.search(r"peak memory: [\d.]+ MB\n", said)
    assert float(re.search(r"output 0: relative error (\S+)", said)[1]) <= 1e-5
    again, features = (np.load(example / name) for name in ("again.npy", "features.npy"))
    assert again.dtype == np.float32 and np.linalg.norm(again - features) <= 1e-5 * np.linalg.norm(features)


@pytest.mark.slow
@needs_kernels
def test_what_the_example_cannot_do_is_said_in_a_line(example):
    """Each of these crashed, or passed in silence. The library's name alone is enough, wherever the system looks."""
    shutil.copy(ops.build_info()["file"], example / "operators.so")
    inputs, (output,) = torch.load(example / "inputs.pt"), torch.load(example / "outputs.pt")
    torch.save({}, example / "dict.pt")
    torch.save([*inputs[:3], inputs[3][..., :-2].contiguous(), *inputs[4:]], example / "narrow.pt")
    torch.save(output * 1.001, example / "near.pt")
    torch.save(output * float("nan"), example / "nan.pt")
    torch.save([output, output], example / "two.pt")
    np.save(example / "ones.npy", np.ones((2, 3)))
    np.save(example / "fortran.npy", np.asfortranarray(np.ones((2, 3))))
    np.save(example / "complex.npy", np.ones(3, complex))
    (example / "cut.npy").write_bytes((example / "ones.npy").read_bytes()[:-1])
    (example / "text.npy").write_text("no numbers here")
    (example / "text.pt").write_text("no tensors here")
    given = {"--operators": "operators.so", "--output": "again.pt", "--iterations": "1"}
    for code, inputs_file, change, message in (
        (0, "inputs.pt", {}, None),
        (0, "inputs.pt", {"--compare": "near.pt", "--tolerance": "0.01"}, None),
        (0, "inputs.pt", {"--output": "again.npy", "--iterations": "0"}, None),
        (3, "inputs.pt", {"--compare": "near.pt"}, None),
        (3, "inputs.pt", {"--compare": "nan.pt"}, None),
        (3, "inputs.pt", {"--compare": "ones.npy"}, None),
        (1, "inputs.pt", {"--compare": "two.pt"}, "two.pt holds 2 tensors, and the model returns 1"),
        (1, "inputs.pt", {"--operators": "none.so"}, "none.so: cannot open shared object file"),
        (1, "none.pt", {}, "none.pt is not a file"),
        (1, "dict.pt", {}, "dict.pt must hold a tensor or a list of tensors"),
        (1, "narrow.pt", {}, "unmatched dim value at 4, expected: 44, but got: 42"),
        (1, "ones.npy", {}, "expected inputs vector size to be"),
        (1, "fortran.npy", {}, "its numbers are in Fortran's order"),
        (1, "complex.npy", {}, "its dtype <c16 is none of a tensor's"),
        (1, "cut.npy", {}, "it holds 47 bytes, and its shape asks for 48"),
        (1, "text.npy", {}, "text.npy is no .npy file that can be read: it does not begin as one"),
        (1, "text.pt", {}, "text.pt is no file of tensors from torch.save"),
        (1, "inputs.png", {}, "ends in .npy or .pt; got inputs.png"),
        (1, "inputs.pt", {"--output": "again.png"}, "ends in .npy or .pt; got again.png"),
        (1, "inputs.pt", {"--output": "none/again.pt"}, "none/again.pt cannot be written"),
        (2, "inputs.pt", {"--device": "tpu"}, '--device takes cpu, cuda or cuda:N; got "tpu"'),
        (2, "inputs.pt", {"--dtype": "int8"}, "--dtype takes float64, float32, float16 or bfloat16"),
        (2, "inputs.pt", {"--iterations": "-1"}, '--iterations takes a whole number from 0 on; got "-1"'),
        (2, "inputs.pt", {"--tolerance": "x"}, '--tolerance takes a number from 0 on; got "x"'),
        (2, "inputs.pt", {"--colour": "red"}, "--colour"),
    ):
        options = [part for option in (given | change).items() for part in option]
        done = run_example(example, "model.pt2", inputs_file, *options)
        assert done.returncode == code, (inputs_file, change, done.stderr)
        assert (message or "") in done.stderr
    for arguments, code, message in (
        (("--help",), 0, "Exit codes: 0, all went well"),
        (("model.pt2",), 2, "a model and at least one file of inputs are needed"),
        (("none.pt2", "inputs.pt"), 1, "none.pt2 is not a file"),
    ):
        done = run_example(example, *arguments)
        assert done.returncode == code and message in done.stdout + done.stderr


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["./run_package", *arguments], cwd=folder, capture_output=True, text=True)


@needs_make
def test_the_example_names_what_its_makefile_misses():
    done = subprocess.run(["make", "TORCH=/nowhere"], cwd=EXAMPLE, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'no libtorch in the folder "/nowhere": run make where python3 has PyTorch, or name one' in done.stderr


@pytest.mark.slow
@needs_kernels
def test_package_in_cpp(package, example):
    folder, expected = package
    files = [folder / name for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    # LD_BIND_NOW resolves every symbol of our library at once, and there is no Python to find any in.
    model, inputs, outputs = map(str, files)
    command = [example / "run_package", model, inputs, "--operators", ops.build_info()["file"], "--output", outputs]
    done = subprocess.run(command, env={"LD_BIND_NOW": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"output 0: {list(expected.shape)} float32, mean " in done.stdout
    assert relative_error(torch.load(files[2])[0], expected) <= TOLERANCE[torch.float32]
