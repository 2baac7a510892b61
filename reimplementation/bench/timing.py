"""How long things take: medians of device time on CUDA, of wall-clock time on the CPU; and what the host takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
STEPS_A_GRAPH = 12  # at least, of short steps: the start of a graph is then lost among them
LONG_STEP_US = 1000.0  # the start of a graph is lost in one such step
HOST_CALLS = 100  # timed together; few enough for CUDA's queue, which makes the host wait when it is full
HOST_WARM_UP_S = 1.0  # until a processor runs at its full speed: at first a call takes nearly twice as long


@dataclass(frozen=True)
class Timing:
    """Microseconds of one step: the median, and the distance between the quartiles.

    method: "graph", replays of a CUDA graph of many steps, which leave out what the host does; "events", CUDA events
    around one step that finds the GPU idle, so the host's time is in it; "wall", a clock around one step; "host", a
    clock around many calls that nobody waits for, so the device's time is not in it.
    """

    median_us: float
    spread_us: float
    method: str


def measure(
    steps: Sequence[Callable[[], object]], device: torch.device, repeats: int = 30, *, graph: bool = True
) -> Timing:
    """Time a step.

    Args:
        steps: the same work on different inputs, run in turn, so that no run finds its inputs in a cache merely because
            the run before left them there.
        device: where the work happens.
        repeats: how often each step is timed.
        graph: on CUDA, replay a graph of the steps where they can be recorded; False: time calls, the host's share
            included.
    """
    for step in list(steps) * WARM_UP:
        step()
    if device.type != "cuda":
        return _summary([_wall_us(step) for _ in range(repeats) for step in steps], "wall")
    torch.cuda.synchronize(device)
    if graph:
        rounds = 1 if _event_us(steps[0]) > LONG_STEP_US else -(-STEPS_A_GRAPH // len(steps))
        try:
            recorded = _captured(list(steps) * rounds)
        except RuntimeError:  # the step waits for the GPU, which a graph cannot record
            torch.cuda.synchronize(device)
        else:
            recorded.replay()
            times = [_event_us(recorded.replay) / (rounds * len(steps)) for _ in range(repeats)]
            return _summary(times, "graph")
    _warm_up_host(lambda: [_event_us(step) for step in steps])
    return _summary([_event_us(step) for _ in range(repeats) for step in steps], "events")


def measure_in_turn(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int = 30) -> list[Timing]:
    """Time steps against one another: calls, the host's share included.

    They run in turn, so that what slows the machine down for a while slows all of them. The timings are in their order.
    """
    begin = time.perf_counter()
    for step in list(steps) * WARM_UP:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        while time.perf_counter() < begin + HOST_WARM_UP_S:
            for step in steps:
                _event_us(step)
    clock, method = (_event_us, "events") if device.type == "cuda" else (_wall_us, "wall")
    rounds = [[clock(step) for step in steps] for _ in range(repeats)]
    return [_summary(list(times), method) for times in zip(*rounds)]


def gpu_time(step: Callable[[], object], device: torch.device) -> float | None:
    """Microseconds of all kernels of a step together, without what they wait for the host; None on a CPU."""
    if device.type != "cuda":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells the terminal that it starts and stops
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profiled.key_averages())


def measure_host(
    call: Callable[[Any], object],
    device: torch.device,
    repeats: int = 30,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> Timing:
    """Time what the host does for one call.

    Args:
        call: takes what ``prepare`` made for it. On the CPU its work is timed too, so let it have little to do.
        device: where the work happens.
        repeats: how often `HOST_CALLS` calls are timed.
        prepare: runs before each call, and outside of the timing.
    """

    def average_us() -> float:
        prepared = [prepare() for _ in range(HOST_CALLS)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for item in prepared:
            call(item)
        return (time.perf_counter() - start) / HOST_CALLS * 1e6

    _warm_up_host(average_us)
    return _summary([average_us() for _ in range(repeats)], "host")


def _warm_up_host(work: Callable[[], object]) -> None:
    begin = time.perf_counter()
    while time.perf_counter() < begin + HOST_WARM_UP_S:
        work()


def _summary(times: list[float], method: str) -> Timing:
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(statistics.median(times), third - first, method)


def _wall_us(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e6


def _event_us(step: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _captured(steps: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph
