"""Many threads, many streams, forked processes: every call gives what it gives alone."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reimplementation import ops
from tests.ops.agreement import KernelCalls, assert_same, run
from tests.ops.table import AGGREGATION

THREADS = 8


@pytest.mark.parametrize("streams", ["own", "shared"])
def test_threads_do_not_disturb_each_other(op, streams, backend, backend_device):
    """Each thread has inputs of its own, and on a GPU a stream of its own, or all have one, whose memory they reuse."""
    if streams == "shared" and backend_device.type == "cpu":
        pytest.skip("there are no streams")
    own = [op.on(backend_device, torch.float32, seed, num_queries=40) for seed in range(THREADS)]
    alone = [run(op, each) for each in own]
    barrier = threading.Barrier(THREADS)

    def repeatedly(each):
        stream = torch.cuda.Stream() if streams == "own" and backend_device.type == "cuda" else None
        barrier.wait()
        with ops.use_backend(backend), torch.cuda.stream(stream):
            results = [run(op, each) for _ in range(5)]
        if backend_device.type == "cuda":
            (stream or torch.cuda.current_stream()).synchronize()
        return results

    if backend_device.type == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(repeatedly, own))
    for expected, results in zip(alone, together):
        for actual in results:
            assert torch.equal(actual[0], expected[0])
            assert_same(op, actual, expected)  # but for atomics and grid_sample's backward


def test_a_forced_backend_is_forced_for_its_thread_alone(kernels):
    operands = AGGREGATION.on(kernels, torch.float32, 1)
    inside, done = threading.Event(), threading.Event()

    def operators_called() -> list[str]:
        with KernelCalls() as calls:
            assert AGGREGATION.function(*operands).isfinite().all()
        return calls.names

    def force():
        with ops.use_backend("grid_sample"):
            inside.set()
            assert done.wait(10)
            return operators_called()

    with ThreadPoolExecutor(1) as pool:
        forced = pool.submit(force)
        assert inside.wait(10)
        assert operators_called() == [AGGREGATION.name]
        done.set()
        assert forced.result() == []


def forward_in_a_fork(function, operands, connection):
    torch.set_num_threads(1)  # as PyTorch's data loaders do: OpenMP's threads do not survive a fork
    connection.send(function(*operands).numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_use(op):
    """A process that has run forward and backward on several threads forks; the child calls the op."""
    operands = op.on("cpu", torch.float32, 3, **op.many)
    expected = run(op, operands)[0]
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=forward_in_a_fork, args=(op.function, operands, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert torch.equal(torch.from_numpy(receiver.recv()), expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
