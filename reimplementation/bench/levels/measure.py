"""Time a level: its first call, then each pass as a call and as a replayed graph; and where time and memory go."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reimplementation.bench.gathers import gathers
from reimplementation.bench.inputs import OpInputs
from reimplementation.bench.memory import extra_memory
from reimplementation.bench.results import MAX_WORDS
from reimplementation.bench.timing import measure

from . import eager
from .catalogue import LEVELS, Call, Level, inputs_of
from .patience import TookTooLong, within

PASSES = ("forward", "training")
MOST_KERNELS = 6  # that have a name of their own; the others are added up
MOST_LETTERS = 80  # of a kernel's name
REST = "others"
CALLS = 10  # timed one by one, for each repeat
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Kernel:
    """A kernel on a GPU, an operator on a CPU, and its microseconds in one pass."""

    name: str
    us: float


@dataclass(frozen=True)
class Pass:
    """What a pass takes; what a device does not tell is None.

    name: "forward", or "training": forward and backward.
    graph_us: GPU time, of a replayed CUDA graph.
    call_us: from a call until its result is there.
    host_us: what of that the host is busy for.
    launches: kernels that it launches.
    extra_bytes: most memory held beyond the inputs.
    kernels: where the time goes, the longest first.
    """

    name: str
    graph_us: float | None
    call_us: float
    host_us: float | None
    launches: int | None
    extra_bytes: int | None
    kernels: list[Kernel]

    @property
    def us(self) -> float:
        """The time to compare levels by: the device's own where that was timed."""
        return self.call_us if self.graph_us is None else self.graph_us


@dataclass(frozen=True)
class Figure:
    """One level of one op.

    missing: why the machine lacks the level, and nothing was timed; else "-".
    lines: of the op's own code.
    first_call_s: seconds of the first forward and backward, compilers included.
    gathered_bytes: of the rows that a forward reads.
    max_error, mean_error: of output and gradients against float64, as a share of the largest number of each.
    """

    op: str
    device: str
    level: int
    name: str
    missing: str
    lines: int | None
    first_call_s: float | None
    gathered_bytes: int | None
    max_error: float | None
    mean_error: float | None
    passes: list[Pass]


def measure_all(
    op: str,
    device: torch.device,
    repeats: int,
    limit: float,
    begins: Callable[[str], object] = lambda what: None,
) -> Iterator[Figure]:
    """Every level of an op on the same inputs; one that takes longer than ``limit`` seconds is missing.

    ``begins`` is told of each.
    """
    inputs = inputs_of(op, device)
    expected = _expected(inputs)
    gathered_bytes = gathers(inputs).gathered_bytes
    for level in LEVELS:
        begins(f"{op}, level {level.number}, {level.name}")
        missing = level.why_not(device)
        if missing is None:
            try:
                with within(limit):
                    figure = _measure(level, op, inputs, expected, gathered_bytes, repeats)
                yield figure
                continue
            except TookTooLong:
                missing = f"it took longer than {limit:g} s"
        lines, reason = level.lines(inputs, device), _printable(missing, MAX_WORDS)
        yield Figure(op, str(device), level.number, level.name, reason, lines, None, None, None, None, [])


def _measure(
    level: Level, op: str, inputs: OpInputs, expected: list[Tensor], gathered_bytes: int, repeats: int
) -> Figure:
    device = expected[0].device
    began = time.perf_counter()
    call = level.prepare(inputs)
    results = _results(call, inputs)
    _wait(device)
    first_call_s = time.perf_counter() - began
    errors = [_errors(actual, wanted) for actual, wanted in zip(results, expected, strict=True)]
    del results
    return Figure(
        op,
        str(device),
        level.number,
        level.name,
        "-",
        level.lines(inputs, device),
        first_call_s,
        gathered_bytes,
        max(largest for largest, _ in errors),
        max(mean for _, mean in errors),
        [_measure_pass(name, _step(call, inputs, name), device, repeats) for name in PASSES],
    )


def _measure_pass(name: str, step: Callable[[], object], device: torch.device, repeats: int) -> Pass:
    timing = measure([step], device, repeats)
    if device.type == "cuda":
        graph_us = timing.median_us if timing.method == "graph" else None
        call_us, host_us = _time_calls(step, device, repeats)
    else:
        graph_us, call_us, host_us = None, timing.median_us, None
    kernels, launches = _kernels(step, device)
    return Pass(name, graph_us, call_us, host_us, launches, extra_memory(step, device), kernels)


def _time_calls(step: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Microseconds until a call's result is there, and until the host is free: medians of calls that find the GPU idle.

    There are `CALLS` for each repeat, and none begins after `MOST_SECONDS`.
    """
    calls: list[float] = []
    hosts: list[float] = []
    end = time.perf_counter() + MOST_SECONDS
    _wait(device)
    while not calls or (len(calls) < CALLS * repeats and time.perf_counter() < end):
        began = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - began)
        _wait(device)
        calls.append(time.perf_counter() - began)
    return statistics.median(calls) * 1e6, statistics.median(hosts) * 1e6


def _step(call: Call, inputs: OpInputs, passed: str) -> Callable[[], object]:
    leaves = _leaves(inputs, records=passed == "training")
    if passed == "forward":
        return torch.no_grad()(lambda: call(*leaves))
    toward = _toward(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, toward)


def _results(call: Call, inputs: OpInputs) -> list[Tensor]:
    """The output and its gradients."""
    leaves = _leaves(inputs, records=True)
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, _toward(output))]


def _expected(inputs: OpInputs) -> list[Tensor]:
    """The same in float64, from the first level."""
    _, shapes, _, _, _ = inputs
    return _results(eager.prepare(inputs), inputs.to(shapes.device, torch.float64))


def _leaves(inputs: OpInputs, records: bool) -> list[Tensor]:
    features, _, _, locations, weights = inputs
    return [tensor.detach().requires_grad_(records) for tensor in (features, locations, weights)]


def _toward(output: Tensor) -> Tensor:
    """The same direction for every level and dtype."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
    return direction.view_as(output).to(output.dtype)


def _errors(actual: Tensor, wanted: Tensor) -> tuple[float, float]:
    difference = (actual.double() - wanted).abs() / wanted.abs().max()
    return difference.max().item(), difference.mean().item()


def _kernels(step: Callable[[], object], device: torch.device) -> tuple[list[Kernel], int | None]:
    """Where the time of a step goes, and on a GPU how many kernels it launches."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells the terminal that it starts and stops
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        step()
        _wait(device)
    found = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
    ]
    found = sorted(((name, us, count) for name, us, count in found if us > 0), key=lambda each: -each[1])
    kernels = [Kernel(_printable(_short(name), MOST_LETTERS), us) for name, us, _ in found[:MOST_KERNELS]]
    if rest := sum(us for _, us, _ in found[MOST_KERNELS:]):
        kernels.append(Kernel(REST, rest))
    return kernels, sum(count for _, _, count in found) if on_gpu else None


def _short(name: str) -> str:
    """The name of a C++ kernel without the arguments of its template and of the function; what Inductor calls its code
    on a CPU is a number."""
    if "CompiledFxGraph" in name:
        return "code of Inductor"
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.partition("<")[0].partition("(")[0] or name


def _printable(words: str, most: int) -> str:
    """The words as a document may hold them: on one line, and not too long."""
    return " ".join("".join(filter(str.isprintable, words)).split())[:most]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
