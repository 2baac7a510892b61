"""torch.compile: one graph, the same numbers and gradients, new sizes without a new graph per size."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from reimplementation import ops
from reimplementation.ops._call import call
from tests.models.table import AGGREGATION, AGGREGATION_OF_MAPS, ATTENTION, trainable
from tests.ops.agreement import assert_close, run
from tests.ops.table import FORMS, without_optional
from tests.reference import TOLERANCE, relative_error

SIZES = ((13, 17), (19, 23))  # batch, queries: not equal to other sizes, which would be coincidences to guard


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def compile_whole(function, backend="aot_eager"):
    """The whole pipeline but code generation, which would be PyTorch's own and slow."""
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=True)


def assert_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
def test_op(op, backend, backend_device, optional):
    """One graph for all sizes, which holds a sampling op's operator, or standard operators alone."""
    if op.is_pointwise and backend == "grid_sample":
        pytest.skip("its formula is traced on every backend")
    if op.keeps and backend == "grid_sample" and not optional:
        pytest.skip("its formula, which takes long to trace, is traced with all operands")
    graphs = []

    def keep(graph: torch.fx.GraphModule, example_inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, example_inputs)

    compiled = compile_whole(op.function, keep)
    for batch, queries in SIZES:
        operands = op.on(backend_device, batch_size=batch, num_queries=queries, **op.lean)
        operands = operands if optional else without_optional(op, operands)
        assert_close(op, run(op, operands, function=compiled), run(op, operands), TOLERANCE[torch.float64])
    assert_one_graph()
    graph = graphs[-1]  # of those begun anew, for a number that turned out to be constant, the one that was kept
    assert ("torch.ops.reimplementation" in graph.code) == (backend != "grid_sample" and not op.is_pointwise)


@pytest.mark.parametrize(("op", "optional"), FORMS, ids=str)
def test_the_first_call_of_all_may_be_compiled(op, optional):
    """What an op works out once has been worked out when a compiler comes first."""
    defined = sys.modules[f"reimplementation.ops.{op.name}"]._OP
    fresh = replace(defined, spec=replace(defined.spec))
    operands = op.on("cpu", **op.lean)
    operands = operands if optional else without_optional(op, operands)
    compiled = torch.compile(lambda *given: call(fresh, *given, settings=op.settings), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*operands), op.function(*operands), rtol=1e-12, atol=1e-12)


def assert_agree(compiled, module, call, leaves) -> None:
    expected, actual = module(*call), compiled(*call)
    assert relative_error(actual, expected) <= TOLERANCE[torch.float32]
    if not torch.is_grad_enabled():
        return
    # All of one sign: a bias' gradient is a sum over rows, of which rounding is all that is left where they cancel.
    toward = torch.linspace(0, 1, expected.numel(), device=expected.device).view_as(expected)
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True
    ):
        assert relative_error(got, wanted) <= 10 * TOLERANCE[torch.float32]


def assert_module_agrees(case, module, device) -> None:
    compiled = compile_whole(module)
    for batch, queries in SIZES:
        operands = case.operands_on(device, batch_size=batch, num_queries=queries)
        assert_agree(compiled, module, case.arguments(*operands), trainable(module))
    assert_one_graph()


@pytest.mark.parametrize(
    ("fused", "case", "training"),
    [
        (True, AGGREGATION, True),
        (True, AGGREGATION_OF_MAPS, False),
        (False, AGGREGATION_OF_MAPS, False),
        *(
            pytest.param(*settings, marks=pytest.mark.slow)
            for settings in [(True, AGGREGATION, False), (True, AGGREGATION_OF_MAPS, True)]
            + [(False, AGGREGATION_OF_MAPS, True), (False, AGGREGATION, True), (False, AGGREGATION, False)]
        ),
    ],
    ids=str,
)
def test_deformable_feature_aggregation(device, fused, case, training):
    """In training with gradients, in evaluation without."""
    module = case.trained(device, use_deformable_func=fused).train(training)
    with torch.set_grad_enabled(training):
        assert_module_agrees(case, module, device)


def test_ms_deform_attn_module(backend_device):
    assert_module_agrees(ATTENTION, ATTENTION.trained(backend_device), backend_device)


def test_dropped_points_while_training(device):
    module = AGGREGATION_OF_MAPS.trained(device, attn_drop=0.5)
    call = AGGREGATION_OF_MAPS.arguments(*AGGREGATION_OF_MAPS.operands_on(device))
    with torch.no_grad():
        output = compile_whole(module)(*call)
    assert torch.isfinite(output).all() and relative_error(output, module.eval()(*call)) > 1e-3


@pytest.mark.slow
@inductor_config.patch(disable_padding_cpu=False)
def test_inductor(op, backend_device):
    """With so many queries that Inductor pads what it stores, as it does on a GPU."""
    operands = op.on(backend_device, num_queries=301)
    compiled = torch.compile(op.function, fullgraph=True)
    assert_close(op, run(op, operands, function=compiled), run(op, operands), TOLERANCE[torch.float64])


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cuda", "triton", "grid_sample"])
def test_compiled_calls_with_maps_let_pytorch_wait_for_nothing(backend):
    """PyTorch's own waits alone are seen so; that there is none in a kernel, `test_cuda_graphs` shows.

    A graph cannot be captured of maps: the levels' shapes are copied from the CPU.
    """
    module = AGGREGATION_OF_MAPS.trained("cuda")
    call = AGGREGATION_OF_MAPS.arguments(*AGGREGATION_OF_MAPS.operands_on("cuda"))
    with ops.use_backend(backend):
        compiled = compile_whole(module)
        compiled(*call).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(*call).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
