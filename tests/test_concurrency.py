"""Many threads, many streams, forked processes: every call gives what it gives alone."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reimplementation import ops
from tests.ops.agreement import run
from tests.ops.inputs import random_attention_inputs, random_inputs
from tests.reference import TOLERANCE, relative_error

THREADS = 8
CALLS = [
    pytest.param(ops.deformable_aggregation_function, random_inputs, id="deformable_aggregation"),
    pytest.param(ops.ms_deform_attn, random_attention_inputs, id="ms_deform_attn"),
]


@pytest.mark.parametrize("streams", ["own", "shared"])
@pytest.mark.parametrize(("function", "inputs"), CALLS)
def test_threads_do_not_disturb_each_other(function, inputs, streams, backend_device):
    """Each thread has inputs of its own, and on a GPU a stream of its own, or all have one, whose memory they reuse."""
    if streams == "shared" and backend_device.type == "cpu":
        pytest.skip("there are no streams")
    own = [inputs(seed, num_queries=40).to(backend_device, torch.float32) for seed in range(THREADS)]
    backend = ops.backends.select_backend(backend_device)
    alone = [run(function, each) for each in own]
    barrier = threading.Barrier(THREADS)

    def repeatedly(each):
        stream = torch.cuda.Stream() if streams == "own" and backend_device.type == "cuda" else None
        barrier.wait()
        with ops.use_backend(backend), torch.cuda.stream(stream):
            results = [run(function, each) for _ in range(5)]
        if backend_device.type == "cuda":
            (stream or torch.cuda.current_stream()).synchronize()
        return results

    if backend_device.type == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(repeatedly, own))
    for wanted, results in zip(alone, together):
        for got in results:
            assert torch.equal(got[0], wanted[0])
            # Atomics and grid_sample's backward may sum in another order.
            assert all(relative_error(a, b) <= TOLERANCE[torch.float32] for a, b in zip(got[1:], wanted[1:]))


def test_a_forced_backend_is_forced_for_its_thread_alone():
    inputs = random_inputs(1).to("cpu", torch.float32)
    inside, done = threading.Event(), threading.Event()

    def force():
        with ops.use_backend("grid_sample"):
            inside.set()
            assert done.wait(10)
            return ops.backends.select_backend(torch.device("cpu"))

    with ThreadPoolExecutor(1) as pool:
        forced = pool.submit(force)
        assert inside.wait(10)
        expected = ops.available_backends("cpu")[0]
        assert ops.backends.select_backend(torch.device("cpu")) == expected
        assert ops.deformable_aggregation_function(*inputs).isfinite().all()
        done.set()
        assert forced.result() == "grid_sample"


@pytest.mark.parametrize(("function", "inputs"), CALLS)
def test_any_number_of_threads_gives_the_same_forward(function, inputs):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    operands = inputs(2, num_queries=400).to("cpu", torch.float32)
    before = torch.get_num_threads()
    try:
        outputs = []
        for num_threads in range(1, THREADS + 1):
            torch.set_num_threads(num_threads)
            outputs.append(function(*operands))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def forward_in_a_fork(function, operands, connection):
    torch.set_num_threads(1)  # as PyTorch's data loaders do: OpenMP's threads do not survive a fork
    connection.send(function(*operands).numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("function", "inputs"), CALLS)
def test_a_fork_after_use(function, inputs):
    """A process that has run forward and backward on several threads forks; the child calls the op."""
    operands = inputs(3, num_queries=400).to("cpu", torch.float32)
    expected = run(function, operands)[0]
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=forward_in_a_fork, args=(function, operands, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert torch.equal(torch.from_numpy(receiver.recv()), expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
