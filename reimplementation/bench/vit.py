"""What a ViT takes: operations, time, memory, of its forward and its backward, at any size of image."""

from __future__ import annotations

import csv
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reimplementation.bench.memory import extra_memory
from reimplementation.bench.timing import Timing, measure
from reimplementation.models.backbones.vit import ViTConfig
from reimplementation.models.backbones.vit.export import DenseFeatures
from reimplementation.ops.dtypes import name_of

PASSES = ("forward", "backward", "forward_backward")
MODES = ("eager", "graph", "compiled", "compiled-graph")  # a graph is CUDA's, replayed: the device's time alone
CSV_COLUMNS = (
    "config_name",
    "batch_size",
    "image_size",
    "pass_mode",
    "mode",
    "dtype",
    "latency_ms",
    "spread_ms",
    "memory_mb",
    "gflops",
    "throughput",
    "tflops_per_s",
)


@dataclass(frozen=True)
class Figure:
    """What a pass of a model took.

    config: the model's name.
    image_size: such as "256x704".
    passed: "forward", in evaluation; "backward" alone; "forward_backward", in training.
    mode: of `MODES`.
    dtype: of weights and images.
    gflops: of the whole batch, counted with a product and a sum as two.
    extra_bytes: most memory that the pass held beyond weights and images; None if unknown.
    least_bytes: of input, weights and output together, which no forward can do without; None of other passes.
    """

    config: str
    batch_size: int
    image_size: str
    passed: str
    mode: str
    dtype: str
    timing: Timing
    gflops: float
    extra_bytes: int | None = None
    least_bytes: int | None = None

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.batch_size / self.timing.median_us * 1e6

    @property
    def tflops_per_s(self) -> float:
        """What of the device's arithmetic the pass used."""
        return self.gflops / self.timing.median_us * 1e3


@dataclass(frozen=True)
class Candidate:
    """What to measure.

    name: of the model, or of a part of it.
    build: makes the module for a size of image; it takes a tensor and returns one.
    sample_shape: of what the module takes, without the batch, for a size of image.
    dtype: of weights and input.
    learns_input: whether a backward goes on to the input, as it does from a part within a model.
    """

    name: str
    build: Callable[[Sequence[int]], nn.Module]
    sample_shape: Callable[[Sequence[int]], tuple[int, ...]]
    dtype: torch.dtype
    learns_input: bool = False


def vit_candidate(name: str, config: ViTConfig, dtype: torch.dtype | None = None) -> Candidate:
    """Our model, without its heads, which a forward does not call."""
    config = config.replace(heads={}, dtype=dtype or config.dtype)

    def build(size: Sequence[int]) -> nn.Module:
        return DenseFeatures(config.replace(img_size=size).instantiate())

    return Candidate(name, build, lambda size: (config.in_channels, *size), config.dtype)


def timm_candidate(name: str, dtype: torch.dtype) -> Candidate:
    """A model of the package timm, without its classifier; ModuleNotFoundError where timm is missing."""
    import timm

    def build(size: Sequence[int]) -> nn.Module:
        model = timm.create_model(name, img_size=tuple(size), num_classes=0, global_pool="")
        return model.to(dtype)

    return Candidate(f"timm {name}", build, lambda size: (3, *size), dtype)


def measure_all(
    candidates: Sequence[Candidate],
    sizes: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    passes: Sequence[str],
    modes: Sequence[str],
    device: torch.device,
    repeats: int,
) -> Iterator[tuple[str, Figure | Exception]]:
    """Every combination, one at a time: what it is called, and its figure or why there is none.

    There is none where memory is too small, or a model does not take images of that size.
    """
    for size, batch_size, passed, candidate, mode in product(sizes, batch_sizes, passes, candidates, modes):
        name = f"{candidate.name} {batch_size} x {_spelled(size)} {passed} {mode}"
        try:
            yield name, measure_candidate(candidate, size, batch_size, passed, mode, device, repeats)
        except (RuntimeError, ValueError, AssertionError) as error:
            yield name, error


def measure_candidate(
    candidate: Candidate,
    size: Sequence[int],
    batch_size: int,
    passed: str,
    mode: str,
    device: torch.device,
    repeats: int,
) -> Figure:
    """Time a pass on random images, and ask for its memory.

    Raises:
        ValueError: the model does not take images of that size, or graphs are asked for on a CPU.
        RuntimeError: such as too little memory.
    """
    if mode.endswith("graph") and device.type != "cuda":
        raise ValueError(f"the mode {mode} replays a CUDA graph, and needs a GPU; got {device}")
    with device:
        model = candidate.build(size).to(device)
    shape = (batch_size, *candidate.sample_shape(size))
    images = torch.randn(shape, device=device, dtype=candidate.dtype, requires_grad=candidate.learns_input)
    run = _compiled(model) if mode.startswith("compiled") else model
    # A compiled backward frees what it has used, unless it is told that it will run again.
    with torch._functorch.config.patch(donated_buffer=False) if passed == "backward" else nullcontext():
        step = _step(run, model, images, passed)
        timing = measure([step], device, repeats, graph=mode.endswith("graph"))
        extra_bytes = extra_memory(step, device)
    return Figure(
        config=candidate.name,
        batch_size=batch_size,
        image_size=_spelled(size),
        passed=passed,
        mode=mode,
        dtype=name_of(candidate.dtype),
        timing=timing,
        gflops=count_flops(candidate, tuple(size), passed) * batch_size / 1e9,
        extra_bytes=extra_bytes,
        least_bytes=_bytes_of(images, *model.parameters(), step()) if passed == "forward" else None,
    )


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()  # lest it count the models before as recompilations, and stop compiling
    return torch.compile(model, dynamic=False)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@functools.lru_cache(maxsize=64)
def count_flops(candidate: Candidate, size: Sequence[int], passed: str = "forward") -> int:
    """Floating-point operations of a pass on one image: matrix products and convolutions, two for each product and sum.

    PyTorch counts them on the meta device, so that nothing is computed. What checkpointing recomputes is left out.
    """
    with torch.device("meta"):
        model = candidate.build(size).to("meta").eval()
        images = torch.empty(1, *candidate.sample_shape(size), dtype=candidate.dtype)
    if (
        passed == "forward"
    ):  # PyTorch's counter stumbles over a module that returns a parameter where no graph is recorded
        model.requires_grad_(False)
    elif candidate.learns_input:
        images.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        output = model(images)
    if passed == "forward":
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    both = passed == "forward_backward"
    return backward.get_total_flops() + (forward.get_total_flops() if both else 0)


def _step(run: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, passed: str) -> Callable[[], Any]:
    """A pass as a function without arguments; gradients go to all weights, and to an input that asks for one."""
    model.train(passed != "forward")
    leaves = [tensor for tensor in (*model.parameters(), images) if tensor.requires_grad]
    if passed == "forward":
        return torch.no_grad()(lambda: run(images))
    if passed == "backward":
        loss = run(images).mean()
        return lambda: torch.autograd.grad(loss, leaves, retain_graph=True)
    return lambda: torch.autograd.grad(run(images).mean(), leaves)


def _spelled(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def write_csv(path: Path, figures: Sequence[Figure]) -> None:
    """A row for each figure; memory is empty where it is unknown."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for figure in figures:
            writer.writerow(
                {
                    "config_name": figure.config,
                    "batch_size": figure.batch_size,
                    "image_size": figure.image_size,
                    "pass_mode": figure.passed,
                    "mode": figure.mode,
                    "dtype": figure.dtype,
                    "latency_ms": figure.timing.median_us / 1e3,
                    "spread_ms": figure.timing.spread_us / 1e3,
                    "memory_mb": "" if figure.extra_bytes is None else figure.extra_bytes / 1e6,
                    "gflops": figure.gflops,
                    "throughput": figure.throughput,
                    "tflops_per_s": figure.tflops_per_s,
                }
            )


@dataclass(frozen=True)
class Latency:
    """Milliseconds of some runs, and what they held at most beyond their inputs, in bytes (None if unknown)."""

    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    peak_bytes: int | None


def measure_latency(step: Callable[[], Any], device: torch.device, warmup: int = 3, iterations: int = 10) -> Latency:
    """Time runs one by one, each waited for, after some that nobody times."""
    for _ in range(warmup):
        step()
    times = [_milliseconds(step, device) for _ in range(iterations)]
    std = statistics.stdev(times) if len(times) > 1 else math.nan
    return Latency(statistics.fmean(times), std, min(times), max(times), extra_memory(step, device))


def _milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
