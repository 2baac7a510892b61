"""CUDA graphs, captured once and replayed on other numbers; and streams other than the current one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.models.cases import trainable
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
            assert relative_error(got, wanted) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_op(op, dtype, training):
    static, *batches = (list(op.inputs(seed).to("cuda", dtype)) for seed in (0, 1, 2))
    leaves = [t.requires_grad_(training) for t in static if t.is_floating_point()]

    def call():
        return op.function(*static)

    assert_replays(lambda: forward_and_gradients(call, leaves) if training else (call(),), static, batches)


@pytest.mark.parametrize("training", [False, True])
def test_module(case, training):
    module = case.trained("cuda").train(training)
    static, *batches = (case.operands_on("cuda", seed) for seed in (0, 1, 2))
    leaves = [*static[: case.num_leaves], *trainable(module)]

    def inference():
        with torch.no_grad():
            return (case.call(module, static),)

    def training_step():
        return forward_and_gradients(lambda: case.call(module, static), leaves)

    assert_replays(training_step if training else inference, static, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_freed_while_another_stream_still_needs_them(op, dtype):
    """Outputs, gradients and whatever the kernels allocate belong to the stream that they run on."""

    def operands():
        features, shapes, starts, locations, weights = op.inputs(23).to("cuda", dtype)
        return features.requires_grad_(), shapes, starts, locations.requires_grad_(), weights.requires_grad_()

    def call(features, shapes, starts, locations, weights):
        leaves = features, locations, weights
        return forward_and_gradients(lambda: op.function(features, shapes, starts, locations, weights), leaves)

    expected = call(*operands())
    # A kernel's first call may wait for the whole GPU: whatever comes later has been called before.
    torch.full((1,), 255, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    given = operands()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        actual = call(*given)
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
        assert relative_error(got, wanted) <= TOLERANCE[got.dtype]
    assert all((block == 255).all() for block in junk)


def test_backward_from_another_stream_than_the_forward(op):
    features, shapes, starts, locations, weights = op.inputs(24).to("cuda", torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (features, locations, weights)]

    def call():
        return op.function(features, shapes, starts, locations, weights)

    _, *expected = forward_and_gradients(call, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        loss = call().square().sum()
    for got, wanted in zip(torch.autograd.grad(loss, leaves), expected):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]
