"""torch.compile: one graph, the same numbers and gradients, new sizes without a new graph per size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from reimplementation import ops
from tests.module_inputs import aggregation_call, aggregation_module, attention_call, attention_module
from tests.ops.inputs import random_attention_inputs, random_inputs
from tests.reference import TOLERANCE, relative_error

OPS = pytest.mark.parametrize(
    ("function", "inputs"),
    [(ops.deformable_aggregation_function, random_inputs), (ops.ms_deform_attn, random_attention_inputs)],
    ids=["deformable_aggregation", "ms_deform_attn"],
)
SIZES = ((5, 7), (6, 11), (7, 13))  # batch, queries: not equal to other sizes, which would be coincidences to guard


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def compile_whole(function):
    """The whole pipeline but code generation, which would be PyTorch's own and slow."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


def assert_agree(compiled, eager, arguments, leaves) -> None:
    expected, actual = eager(*arguments), compiled(*arguments)
    dtype = torch.float64 if expected.dtype == torch.float64 else torch.float32
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    toward = torch.linspace(-1, 1, expected.numel(), dtype=dtype, device=expected.device).view_as(expected)
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, toward), torch.autograd.grad(expected, leaves, toward), strict=True
    ):
        assert relative_error(got, wanted) <= 10 * TOLERANCE[dtype]


def assert_one_graph() -> None:
    assert counters["stats"]["unique_graphs"] == 1


@OPS
def test_ops(backend_device, function, inputs):
    compiled = compile_whole(function)
    for batch, queries in SIZES:
        operands = [
            t.requires_grad_() if t.is_floating_point() else t
            for t in inputs(batch_size=batch, num_queries=queries).to(backend_device, torch.float64)
        ]
        assert_agree(compiled, function, operands, [t for t in operands if t.requires_grad])
    assert_one_graph()


@pytest.mark.parametrize(
    ("fused", "formatted", "training"),
    [
        (True, True, True),
        (True, False, False),
        (False, False, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(True, True, False), (True, False, True), (False, False, False)]
            + [(False, True, True), (False, True, False)]
        ),
    ],
)
def test_deformable_feature_aggregation(device, fused, formatted, training):
    module = aggregation_module(fused=fused).train(training).to(device)
    compiled = compile_whole(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for batch, queries in SIZES:
        call = aggregation_call(batch, queries, formatted=formatted, device=device)
        assert_agree(compiled, module, call, parameters)
    assert_one_graph()


def test_dropped_points_while_training(device):
    module = aggregation_module(attn_drop=0.5).to(device)
    call = aggregation_call(2, 5, device=device)
    with torch.no_grad():
        output = compile_whole(module)(*call)
    assert torch.isfinite(output).all() and relative_error(output, module.eval()(*call)) > 1e-3


def test_ms_deform_attn_module(backend_device):
    module = attention_module().to(backend_device)
    compiled = compile_whole(module)
    for batch, queries in SIZES:
        assert_agree(compiled, module, attention_call(batch, queries, backend_device), list(module.parameters()))
    assert_one_graph()


@pytest.mark.slow
@OPS
def test_inductor(backend_device, function, inputs):
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in inputs().to(backend_device, torch.float64)]
    compiled = torch.compile(function, fullgraph=True)
    assert_agree(compiled, function, operands, [t for t in operands if t.requires_grad])


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["cuda", "grid_sample"])
@pytest.mark.parametrize(
    ("module", "call"),
    [(aggregation_module, aggregation_call), (attention_module, attention_call)],
    ids=["aggregation", "attention"],
)
def test_compiled_modules_do_not_wait_for_the_gpu(module, call, backend):
    module, call = module().to("cuda"), call(2, 5, device="cuda")
    with ops.use_backend(backend):
        compiled = compile_whole(module)
        compiled(*call).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(*call).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
