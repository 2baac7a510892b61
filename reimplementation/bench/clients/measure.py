"""One model, before and after `integrations.accelerate`, in one process: time, attention's share of it, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reimplementation.bench import results
from reimplementation.bench.memory import extra_memory
from reimplementation.bench.results import Document
from reimplementation.bench.timing import Timing, measure
from reimplementation.integrations import accelerate

from .models import MODELS, versions

PASSES = ("forward", "training")
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What autocast runs a model in; None without autocast."""


@dataclass(frozen=True)
class Side:
    """A model as it is, or accelerated.

    timing: of one step, with what the host does. attention_share: the part of a forward that its attention modules
    take, those that are replaced, each with its linear layers. extra_bytes: the most memory that a step held beyond
    the model and its inputs; None if unknown.
    """

    timing: Timing
    attention_share: float
    extra_bytes: int | None


@dataclass(frozen=True)
class ClientResult:
    """A model's step on both sides. modules: how many were replaced; dtype: with a half one, under autocast."""

    model: str
    device: str
    dtype: str
    batch: int
    passed: str
    modules: int
    original: Side
    accelerated: Side

    @property
    def speedup(self) -> float:
        return self.original.timing.median_us / self.accelerated.timing.median_us


@dataclass(frozen=True)
class Choice:
    """What a run is to time."""

    models: Sequence[str]
    dtypes: Sequence[str]
    batches: Sequence[int]
    passes: Sequence[str]

    def __len__(self) -> int:
        return len(self.models) * len(self.dtypes) * len(self.batches) * len(self.passes)


def measure_all(
    choice: Choice,
    device: torch.device,
    repeats: int,
    *,
    begins: Callable[[str], None],
    fails: Callable[[str], None],
) -> Document:
    """Time all that was chosen; what fails is left out. ``begins`` and ``fails`` are told as in `bench.run`.

    Raises:
        RuntimeError: nothing could be timed.
        ModuleNotFoundError: the package of the models is not installed.
    """
    packages, found = versions(), []
    for name in choice.models:
        model = None
        for dtype in choice.dtypes:
            for batch in choice.batches:
                for passed in choice.passes:
                    what = f"{name} {dtype} batch {batch} {passed}"
                    begins(what)
                    try:
                        model = model if model is not None else MODELS[name].build(device)
                        found.append(_measure(name, model, device, dtype, batch, passed, repeats))
                    except (RuntimeError, ValueError, TypeError) as error:  # too little memory, or another version
                        fails(f"{what} failed: {error}")
    if not found:
        raise RuntimeError("nothing could be timed")
    return results.describe(device, found, packages=packages)


def _measure(
    name: str, model: nn.Module, device: torch.device, dtype: str, batch: int, passed: str, repeats: int
) -> ClientResult:
    inputs = MODELS[name].inputs(batch, device)
    report = accelerate(model)
    modules = [replaced.module for replaced in report.replaced]
    report.undo()
    original = _side(model, modules, inputs, device, dtype, passed, repeats)
    report = accelerate(model)
    try:
        ours = _side(model, modules, inputs, device, dtype, passed, repeats)
    finally:
        report.undo()
    return ClientResult(name, str(device), dtype, batch, passed, len(modules), original, ours)


def _side(
    model: nn.Module,
    modules: Sequence[nn.Module],
    inputs: dict[str, Tensor],
    device: torch.device,
    dtype: str,
    passed: str,
    repeats: int,
) -> Side:
    half = DTYPES[dtype]

    def forward() -> object:
        with torch.autocast(device.type, half) if half is not None else nullcontext():
            return model(**inputs)

    @torch.no_grad()
    def inference() -> None:
        forward()

    def training() -> None:
        model.zero_grad()
        _loss(forward()).backward()

    model.train(passed == "training")
    step = training if passed == "training" else inference
    timing = measure([step], device, repeats, graph=False)
    side = Side(timing, _share(inference, modules, device, max(3, repeats // 4)), extra_memory(step, device))
    model.zero_grad()
    return side


def _loss(outputs: object) -> Tensor:
    """What reaches every output."""
    tensors = [t for t in outputs.values() if isinstance(t, Tensor) and t.requires_grad]  # type: ignore[attr-defined]
    return sum((t.float().masked_fill(~t.isfinite(), 0).square().mean() for t in tensors), start=torch.zeros(()))


def _share(step: Callable[[], None], modules: Sequence[nn.Module], device: torch.device, repeats: int) -> float:
    """The part of a step's time that passes within the modules."""
    clock = _Clock(device)
    handles = [
        handle
        for module in modules
        for handle in (
            module.register_forward_pre_hook(lambda *_: clock.mark()),
            module.register_forward_hook(lambda *_: clock.mark()),
        )
    ]
    within = total = 0.0
    try:
        for _ in range(repeats):
            clock.mark()
            step()
            clock.mark()
            first, *inner, last = clock.read()
            total += last - first
            within += sum(end - begin for begin, end in zip(inner[::2], inner[1::2]))
    finally:
        for handle in handles:
            handle.remove()
    return within / total


class _Clock:
    """Marks of time: on a GPU of its own clock, in its stream."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """The marks since the last reading, from the first on."""
        marks, self._marks = self._marks, []
        if not self._on_gpu:
            return [mark - marks[0] for mark in marks]
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) for mark in marks]
