"""How long things take: medians of device time on CUDA, of wall-clock time on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UP = 3
STEPS_A_GRAPH = 12  # at least: the start of a graph is then lost among them


@dataclass(frozen=True)
class Timing:
    """Microseconds of one step: the median, and the distance between the quartiles.

    method: "graph", replays of a CUDA graph of many steps, which leave out what the host does; "events", CUDA events
    around one step; "wall", a clock around one step.
    """

    median_us: float
    spread_us: float
    method: str


def measure(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int = 30) -> Timing:
    """Time a step.

    Args:
        steps: the same work on different inputs, run in turn, so that no run finds its inputs in a cache merely because
            the run before left them there.
        device: where the work happens.
        repeats: how often each step is timed.
    """
    for step in list(steps) * WARM_UP:
        step()
    if device.type != "cuda":
        return _summary([_wall_us(step) for _ in range(repeats) for step in steps], "wall")
    torch.cuda.synchronize(device)
    rounds = -(-STEPS_A_GRAPH // len(steps))
    try:
        graph = _captured(list(steps) * rounds)
    except RuntimeError:  # the step waits for the GPU, which a graph cannot record
        torch.cuda.synchronize(device)
        return _summary([_event_us(step) for _ in range(repeats) for step in steps], "events")
    graph.replay()
    return _summary([_event_us(graph.replay) / (rounds * len(steps)) for _ in range(repeats)], "graph")


def _summary(times: list[float], method: str) -> Timing:
    first, _, third = statistics.quantiles(times, n=4)
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
