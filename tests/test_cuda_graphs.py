"""CUDA graphs, captured once and replayed on other numbers; and streams other than the current one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from reimplementation import ops
from tests.models.table import ATTENTION, trainable
from tests.ops.agreement import leaves_of
from tests.reference import TOLERANCE, relative_error

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]

LONG = 500_000_000  # clock cycles: some tenths of a second, in which everything else that is queued starts


def forward_and_gradients(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of its sum of squares."""
    output = call()
    return output.detach(), *torch.autograd.grad(output.square().sum(), leaves)


def capture(function: Callable) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of one call, and the tensors that every replay writes; warmed up on a side stream, as capture wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_agree(gradient: Tensor, expected: Tensor) -> None:
    """Up to the order in which atomics add; or bit by bit, with infinities, to which half precision may overflow."""
    error = relative_error(gradient, expected)
    assert torch.equal(gradient, expected) or error <= TOLERANCE[gradient.dtype]


@torch.no_grad()
def overwrite(static: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
    for old, new in zip(static, fresh, strict=True):
        old.copy_(new)


def assert_replays(function: Callable, static: Sequence[Tensor], batches: Sequence[Sequence[Tensor]]) -> None:
    """Replays equal calls: outputs bit by bit, gradients up to the order in which atomics add."""
    graph, replayed = capture(function)
    for fresh in batches:
        overwrite(static, fresh)
        graph.replay()
        output, *gradients = (result.clone() for result in replayed)
        expected_output, *expected = function()
        assert torch.equal(output, expected_output)
        for got, wanted in zip(gradients, expected, strict=True):
            assert_agree(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_op(op, dtype, training):
    """Capture refuses whatever waits for the GPU, in our kernels too: the ops are free of it."""
    static, *batches = (op.on("cuda", dtype, seed) for seed in (0, 1, 2))
    leaves = leaves_of(op, static) if training else []

    def call():
        return op.function(*static)

    assert_replays(lambda: forward_and_gradients(call, leaves) if training else (call(),), static, batches)


@pytest.mark.parametrize("backend", ["cuda", "triton", "grid_sample"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("training", [False, True])
def test_module(case, training, way, backend):
    """grid_sample reads the levels' shapes as numbers, for which it waits; what a compiler makes of it need not."""
    if backend == "grid_sample" and way == "eager":
        pytest.skip("it waits for the GPU")
    with ops.use_backend(backend):
        assert_module_replays(case, training, compiled=way == "compiled")


def assert_module_replays(case, training: bool, compiled: bool) -> None:
    module = case.trained("cuda").train(training)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True, backend="aot_eager")
    static, *batches = (case.operands_on("cuda", seed) for seed in (0, 1, 2))
    leaves = [*static[: case.num_leaves], *trainable(module)]

    def inference():
        with torch.no_grad():
            return (case.call(module, static),)

    def training_step():
        return forward_and_gradients(lambda: case.call(module, static), leaves)

    assert_replays(training_step if training else inference, static, batches)


class OfTensors(torch.nn.Module):
    """A module that takes a row's operands, as `torch.cuda.make_graphed_callables` wants tensors alone."""

    def __init__(self, case, module: torch.nn.Module):
        super().__init__()
        self.module, self.case = module, case

    def forward(self, *operands: Tensor) -> Tensor:
        return self.case.call(self.module, list(operands))


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["float32", "bfloat16-autocast"])
def test_graphed_callables(case, half):
    """The module as two graphs, of its forward and of its backward, called as a module is; in training and without."""
    plain = OfTensors(case, case.trained("cuda"))

    def autocast():
        """Without its cache: what it holds of earlier calls would be no part of a graph."""
        return torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None, cache_enabled=False)

    def results(module, operands) -> tuple[Tensor, ...]:
        def call() -> Tensor:
            with autocast():
                return module(*operands).float()

        with torch.no_grad():
            inference = call()
        return inference, *forward_and_gradients(call, [*operands[: case.num_leaves], *trainable(plain)])

    with autocast():
        graphed = torch.cuda.make_graphed_callables(OfTensors(case, plain.module), tuple(case.operands_on("cuda", 0)))
    for seed in (1, 2):
        operands = case.operands_on("cuda", seed)
        inference, output, *gradients = results(graphed, operands)
        expected_inference, expected_output, *expected = results(plain, operands)
        assert torch.equal(inference, expected_inference)
        assert torch.equal(output, expected_output)
        for got, wanted in zip(gradients, expected, strict=True):
            assert relative_error(got, wanted) <= TOLERANCE[half or torch.float32]


def test_attention_with_padding():
    module = ATTENTION.trained("cuda")
    static, *batches = (ATTENTION.operands_on("cuda", seed) for seed in (0, 1, 2))
    leaves = [*static[: ATTENTION.num_leaves], *trainable(module)]
    mask = torch.arange(static[1].shape[1], device="cuda") % 3 == 0

    def call():
        return module(*ATTENTION.arguments(*static), mask.expand(static[1].shape[:2]))

    assert_replays(lambda: forward_and_gradients(call, leaves), static, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_freed_while_another_stream_still_needs_them(op, dtype):
    """Outputs, gradients and whatever the kernels allocate belong to the stream that they run on."""

    def call(operands):
        return forward_and_gradients(lambda: op.function(*operands), [operands[i] for i in op.differentiable])

    def operands() -> list[Tensor]:
        drawn = op.on("cuda", dtype, 23)
        leaves_of(op, drawn)
        return drawn

    expected = call(operands())
    # A kernel's first call may wait for the whole GPU: whatever comes later has been called before.
    torch.full((1,), 255, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    given = operands()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        actual = call(given)
    for tensor in given:
        tensor.record_stream(stream)
    sizes = [tensor.numel() * tensor.element_size() for tensor in (*given, *actual)]
    del given, tensor
    # Memory that was free too early is taken again here, and overwritten before the stream wakes up.
    junk = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes for _ in range(4)]
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "the stream woke up too early for this test to see anything"
    stream.synchronize()
    assert torch.equal(actual[0], expected[0])
    for got, wanted in zip(actual, expected):
        assert_agree(got, wanted)
    assert all((block == 255).all() for block in junk)


def test_backward_from_another_stream_than_the_forward(op):
    operands = op.on("cuda", torch.float32, 24)
    leaves = leaves_of(op, operands)

    def call():
        return op.function(*operands)

    _, *expected = forward_and_gradients(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        loss = call().square().sum()
    for got, wanted in zip(torch.autograd.grad(loss, leaves), expected):
        assert_agree(got, wanted)
