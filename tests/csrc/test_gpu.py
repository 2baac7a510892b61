"""What the CUDA kernels' host code owes its callers: level tables, streams, errors, steps beyond 32 bits."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ops.inputs import random_attention_inputs
from tests.ops.table import SAMPLING_OPS
from tests.reference import TOLERANCE, relative_error

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]

LONG = 500_000_000  # clock cycles: some tenths of a second
EVERYTHING = (True, True, True)


@pytest.fixture(params=SAMPLING_OPS, ids=str)
def op(request):
    return request.param


def with_levels_on_the_cpu(op, pinned: bool):
    features, shapes, starts, locations, weights = op.on("cuda", torch.float32, 41)
    shapes, starts = shapes.cpu(), starts.cpu()
    return (features, *((shapes.pin_memory(), starts.pin_memory()) if pinned else (shapes, starts)), locations, weights)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_graph_replays_the_levels_that_it_captured(op, pinned):
    operands = with_levels_on_the_cpu(op, pinned)
    expected = op.forward(*operands)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = op.forward(*operands)
    operands[1].zero_()
    operands[2].fill_(3)
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("pinned", [False, True])
def test_levels_may_change_as_soon_as_the_call_returns(op, pinned):
    operands = with_levels_on_the_cpu(op, pinned)
    expected = op.forward(*operands)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # what the call launches comes after
    output = op.forward(*operands)
    operands[1].zero_()
    operands[2].fill_(3)
    assert torch.equal(output, expected)


def test_more_levels_than_fit_the_arguments_of_one_kernel():
    inputs = random_attention_inputs(42, num_points=1, shapes=((1, 2),) * 1200).to("cuda", torch.float32)
    value, shapes, starts, locations, weights = inputs
    forward = torch.ops.reimplementation.ms_deform_attn
    assert torch.equal(forward(value, shapes.cpu(), starts.cpu(), locations, weights), forward(*inputs))


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_that_capture_at_the_same_time_do_not_meet_in_a_stream(op, deterministic):
    """Two threads have a capture open while both, and a third that captures nothing, run a backward on side streams."""
    own = [op.on("cuda", torch.float32, 43 + i) for i in range(3)]
    grads = [torch.randn_like(op.forward(*inputs)) for inputs in own]

    def backward(i: int):
        return op.backward(grads[i], *own[i], *EVERYTHING, deterministic)

    expected = [backward(i) for i in range(3)]
    torch.cuda.synchronize()
    barrier = threading.Barrier(3, timeout=60)

    def captured(i: int):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            barrier.wait()
            backward(i)
            results = backward(i)  # takes the side streams that the first call gave back
            barrier.wait()
            graph.capture_end()
        barrier.wait()  # nobody may wait for the device while another thread captures
        graph.replay()
        torch.cuda.synchronize()
        return results

    def eager(i: int):
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait()
            results = [backward(i) for _ in range(3)][-1]
            barrier.wait()
            torch.cuda.current_stream().synchronize()
        barrier.wait()
        return results

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(captured, 0), pool.submit(captured, 1), pool.submit(eager, 2)]
        found = [future.result() for future in running]
    for got, wanted in zip(found, expected):
        assert all(relative_error(a, b) <= TOLERANCE[torch.float32] for a, b in zip(got, wanted))


BROKEN = """
import torch
from reimplementation import ops
from tests.ops.inputs import random_inputs

features, shapes, starts, locations, weights = random_inputs(44, num_queries=1, batch_size=1).to("cuda", torch.float32)
many = [t.expand(1, 2_000_000, *t.shape[2:]) for t in (locations, weights)]  # whose output takes new memory
try:
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()
except RuntimeError as error:
    assert "assert" in str(error), error
try:
    torch.ops.reimplementation.deformable_aggregation(features, shapes, starts, *many)
except RuntimeError as error:
    print(error)
"""


def test_a_gpu_that_an_earlier_kernel_broke_is_not_out_of_memory():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert "out of memory" not in done.stdout
    assert "on cuda:0" in done.stdout and "assert" in done.stdout, done.stdout + done.stderr


def test_the_stride_of_a_single_query_means_nothing(op):
    inputs = op.on("cuda", torch.float32, 45, batch_size=1, num_queries=1)
    features, shapes, starts, *samples = inputs
    odd = [t.as_strided(t.shape, (t.stride(0), 2**40, *t.stride()[2:])) for t in samples]
    output = op.forward(*inputs)
    assert torch.equal(op.forward(features, shapes, starts, *odd), output)
    for deterministic in (False, True):
        wanted = op.backward(output, *inputs, *EVERYTHING, deterministic)
        got = op.backward(output, features, shapes, starts, *odd, *EVERYTHING, deterministic)
        assert all(relative_error(a, b) <= TOLERANCE[torch.float32] for a, b in zip(got, wanted))


@pytest.mark.huge
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 100e9,
    reason="needs a CUDA device with more than 100 GB",
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_weights_of_one_query_beyond_32_bits(batch_size, deterministic):
    """Each query's gradient of the features, one query a call; both queries' is their sum."""
    queries, points, cams, levels, groups = 2, 1024, 256, 4, 2048
    half = {"device": "cuda", "dtype": torch.float16}
    generator = torch.Generator("cuda").manual_seed(46)
    features = torch.rand(batch_size, 6 * levels, groups, generator=generator, **half)
    shapes = torch.tensor([2, 3], device="cuda").expand(cams, levels, 2)
    starts = (6 * torch.arange(levels, device="cuda")).expand(cams, levels)
    pairs = (batch_size, queries, points, cams)
    locations = torch.rand(*pairs, 2, device="cuda", generator=generator)
    weights = torch.rand(*pairs, levels, groups, generator=generator, **half) / (points * cams)
    grad_output = torch.rand(batch_size, queries, groups, generator=generator, **half)
    assert weights.stride(1) == 2**31

    def gradient(at: slice) -> torch.Tensor:
        backward = torch.ops.reimplementation.deformable_aggregation_backward
        samples = grad_output[:, at], features, shapes, starts, locations[:, at], weights[:, at]
        return backward(*samples, True, False, False, deterministic)[0]

    both = gradient(slice(None))
    wanted = gradient(slice(0, 1)).double() + gradient(slice(1, 2)).double()
    assert wanted.any()
    assert relative_error(both, wanted) <= TOLERANCE[torch.float16]
