"""The whole module on every backend of this machine: time, memory, and the error against float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.bench.memory import extra_memory
from reimplementation.ops.dtypes import name_of

SECONDS_PER_FIGURE, MAX_REPEATS = 1.2, 50
DTYPES = {  # a backend on a device: what is worth timing there
    ("cuda", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("cuda", "triton"): (torch.float32, torch.float16, torch.bfloat16),
    ("cuda", "grid_sample"): (torch.float32, torch.float16, torch.bfloat16),
    ("cpu", "cpu"): (torch.float32, torch.bfloat16),
    ("cpu", "grid_sample"): (torch.float32,),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    device: str
    backend: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return name_of(self.dtype)


@dataclass(frozen=True)
class Timing:
    """What a case took.

    forward_ms, training_ms  median milliseconds of a forward pass, and of forward and backward together
    extra_bytes              most memory held in both passes beyond parameters and inputs; None if unknown
    max_error                largest error of the output against float64, over the largest float64 output
    """

    case: Case
    forward_ms: float
    training_ms: float
    extra_bytes: int | None
    max_error: float


class Called(Protocol):
    """A module with one batch of inputs, ready to be called."""

    @property
    def module(self) -> nn.Module:
        """What is called."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs whose gradients are taken."""

    def forward(self) -> Tensor:
        """Call the module."""


class Timed(Called, Protocol):
    """The same, which can be had with other inputs and elsewhere: what `measure` times."""

    @property
    def at(self) -> Callable[..., Timed]:
        """Takes others of these inputs; the same module with them."""

    def to(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Timed:
        """The same elsewhere; gradients of the result do not reach this one's tensors."""


def cases() -> list[Case]:
    """Every backend of every kind of device here, with the dtypes worth timing."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        Case(device, backend, dtype)
        for device in devices
        for backend in ops.available_backends(device)
        for dtype in DTYPES[device, backend]
    ]


def reference(of: Timed) -> Tensor:
    """The module's output in float64, on the CPU and in plain PyTorch."""
    with torch.no_grad(), ops.use_backend("grid_sample"):
        return of.to(dtype=torch.float64).forward()


@contextmanager
def running(case: Case) -> Iterator[None]:
    """As the case runs a module: on its backend, and half precision under autocast, as a model is around a module."""
    half = case.dtype in (torch.float16, torch.bfloat16)
    device_type = torch.device(case.device).type
    with ops.use_backend(case.backend), torch.autocast(device_type, case.dtype, enabled=half):
        yield


def training_step(of: Called) -> Callable[[], object]:
    """The module's forward and backward, to be called while it is `running`; weights are cast anew, as they change."""
    for leaf in of.leaves:
        leaf.requires_grad_()
    leaves = [*of.leaves, *(parameter for parameter in of.module.parameters() if parameter.requires_grad)]
    with torch.no_grad():
        grad_output = torch.ones_like(of.forward())

    def step() -> tuple[Tensor, ...]:
        torch.clear_autocast_cache()
        return torch.autograd.grad(of.forward(), leaves, grad_output)

    return step


def measure(of: Timed, expected: Tensor, case: Case) -> Timing:
    """Time the module in one case; half precision runs under autocast, with features in that dtype."""
    of = of.to(case.device, case.dtype)
    with running(case):
        training = training_step(of)
        with torch.no_grad():
            error = (of.forward().cpu().double() - expected).abs().max() / expected.abs().max()
            forward_ms = _milliseconds(of.forward, case.device)
        extra_bytes = extra_memory(training, case.device)
        return Timing(case, forward_ms, _milliseconds(training, case.device), extra_bytes, error.item())


def measure_all(of: Timed, begins: Callable[[str], None]) -> list[Timing]:
    """Time the module in all of `cases`; ``begins`` is told what comes next, in words."""
    begins("the module in float64")
    expected = reference(of)
    timings = []
    for case in cases():
        begins(f"the module on {case.backend}, {case.dtype_name}")
        timings.append(measure(of, expected, case))
    return timings


def module_document(name: str, queries: int, sizes: str, timings: Sequence[Timing]) -> dict:
    """What was timed and what came out, ready for JSON."""
    return {
        "name": name,
        "queries": queries,
        "sizes": sizes,
        "error": "largest error of the module's output against float64, over the largest float64 output",
        "timings": [
            {
                "device": timing.case.device,
                "backend": timing.case.backend,
                "dtype": timing.case.dtype_name,
                "forward_ms": timing.forward_ms,
                "forward_backward_ms": timing.training_ms,
                "extra_memory_bytes": timing.extra_bytes,
                "max_relative_error": timing.max_error,
            }
            for timing in timings
        ],
    }


def _milliseconds(step: Callable[[], object], device: str) -> float:
    """The median wall-clock time of a step that has already run, repeated for about a second."""
    times: list[float] = []
    while not times or (sum(times) < SECONDS_PER_FIGURE and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
