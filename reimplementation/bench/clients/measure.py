"""One model, before and after `integrations.accelerate`, in one process: time, attention's share of it, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reimplementation.bench import results
from reimplementation.bench.memory import extra_memory
from reimplementation.bench.results import Document
from reimplementation.bench.timing import Timing, gpu_time, measure_in_turn

from .models import MODELS, versions
from .sides import PEER, Runner, peer_version, runners

PASSES = ("forward", "training")
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What autocast runs a model in; None without autocast."""


@dataclass(frozen=True)
class Side:
    """A model as it is, or on somebody's ops.

    timing: of one step, with what the host does. attention_share: the part of a forward that its attention modules
    take, those that `accelerate` replaces, each with its linear layers; None of a step of training. extra_bytes: the
    most memory that a step held beyond the model and its inputs; None if unknown. gpu_us: of the step's kernels alone,
    which do not depend on the host; None on a CPU.
    """

    timing: Timing
    attention_share: float | None
    extra_bytes: int | None
    gpu_us: float | None = None


@dataclass(frozen=True)
class ClientResult:
    """A model's step on all sides, timed in turn.

    modules: how many were replaced. dtype: with a half one, under autocast. deformops: None where that package was
    not timed, or does not know the model.
    """

    model: str
    device: str
    dtype: str
    batch: int
    passed: str
    modules: int
    original: Side
    accelerated: Side
    deformops: Side | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, self.device, self.dtype, str(self.batch), self.passed

    @property
    def speedup(self) -> float:
        return self.original.timing.median_us / self.accelerated.timing.median_us


@dataclass(frozen=True)
class Choice:
    """What a run is to time. peer: whether deformops is, too."""

    models: Sequence[str]
    dtypes: Sequence[str]
    batches: Sequence[int]
    passes: Sequence[str]
    peer: bool = False

    def __len__(self) -> int:
        return len(self.models) * len(self.dtypes) * len(self.batches) * len(self.passes)


@dataclass(frozen=True)
class Listener:
    """Who is told how a run gets on.

    begins: what is timed next. says: what failed and is left out, and how long each model took. keeps: the results so
    far, after each model, so that a run that ends early is not lost.
    """

    begins: Callable[[str], None]
    says: Callable[[str], None]
    keeps: Callable[[Document], None]


def measure_all(choice: Choice, device: torch.device, repeats: int, listener: Listener) -> Document:
    """Time all that was chosen; what fails is left out.

    Raises:
        RuntimeError: nothing could be timed.
        ModuleNotFoundError: the package of the models is not installed.
    """
    packages = versions() | (peer_version() if choice.peer else {})
    found: list[ClientResult] = []
    for name in choice.models:
        begin = time.perf_counter()
        found += _measure_model(name, choice, device, repeats, listener)
        listener.says(f"{name}: {time.perf_counter() - begin:.1f} s")
        if found:
            listener.keeps(results.describe(device, found, packages=packages))
    if not found:
        raise RuntimeError("nothing could be timed")
    return results.describe(device, found, packages=packages)


def _measure_model(
    name: str, choice: Choice, device: torch.device, repeats: int, listener: Listener
) -> Iterator[ClientResult]:
    sides: dict[str, Runner] = {}
    for dtype in choice.dtypes:
        for batch in choice.batches:
            for passed in choice.passes:
                what = f"{name} {dtype} batch {batch} {passed}"
                listener.begins(what)
                try:
                    sides = sides or runners(MODELS[name].build(device), choice.peer)
                    inputs = MODELS[name].inputs(batch, device)
                    steps = {side: _Step(runner, inputs, device, dtype, passed) for side, runner in sides.items()}
                    if PEER in steps and (reason := _why_not(steps[PEER])):
                        listener.says(f"{what}: {PEER} failed: {reason}")
                        del steps[PEER]
                    taken = dict(zip(steps, _measure_sides(list(steps.values()), device, repeats)))
                except (
                    Exception
                ) as error:  # too little memory, or another version, of which nobody knows what it raises
                    listener.says(f"{what} failed: {error}")
                    continue
                modules = len(sides["accelerated"].attention)
                yield ClientResult(name, str(device), dtype, batch, passed, modules, **taken)


class _Step:
    """One step of a model: a forward, or a forward and its backward."""

    def __init__(self, runner: Runner, inputs: dict[str, Tensor], device: torch.device, dtype: str, passed: str):
        self.runner, self._inputs, self._device, self._half = runner, inputs, device, DTYPES[dtype]
        self.trains = passed == "training"
        runner.model.train(self.trains)

    def __call__(self) -> None:
        if self.trains:
            self.runner.model.zero_grad()
            _loss(self._forward()).backward()
        else:
            with torch.no_grad():
                self._forward()

    def _forward(self) -> object:
        with torch.autocast(self._device.type, self._half) if self._half is not None else nullcontext():
            return self.runner.model(**self._inputs)


def _measure_sides(steps: Sequence[_Step], device: torch.device, repeats: int) -> list[Side]:
    timings = measure_in_turn(steps, device, repeats)
    sides = []
    for step, timing in zip(steps, timings):
        share = None if step.trains else _share(step, device, max(3, repeats // 4))
        sides.append(Side(timing, share, extra_memory(step, device), gpu_time(step, device)))
        step.runner.model.zero_grad()
    return sides


def _why_not(step: _Step) -> str | None:
    """What somebody else's code says when it cannot run a step, whatever it raises."""
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _loss(outputs: object) -> Tensor:
    """What reaches every output."""
    tensors = [t for t in outputs.values() if isinstance(t, Tensor) and t.requires_grad]  # type: ignore[attr-defined]
    return sum((t.float().masked_fill(~t.isfinite(), 0).square().mean() for t in tensors), start=torch.zeros(()))


def _share(step: _Step, device: torch.device, repeats: int) -> float:
    """The part of a step's time that passes within its attention modules."""
    clock = _Clock(device)
    within = total = 0.0
    with ExitStack() as stack:
        for module in step.runner.attention:
            stack.enter_context(clock.between(module))
        for _ in range(repeats):
            clock.mark()
            step()
            clock.mark()
            first, *inner, last = clock.read()
            total += last - first
            within += sum(end - begin for begin, end in zip(inner[::2], inner[1::2]))
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

    @contextmanager
    def between(self, module: nn.Module) -> Iterator[None]:
        """Marks where a module's forward begins and ends; not by hooks, for which modules compute more."""
        forward = module.forward

        def marked(*arguments: Any, **named: Any) -> Any:
            self.mark()
            output = forward(*arguments, **named)
            self.mark()
            return output

        module.forward = marked
        try:
            yield
        finally:
            del module.forward

    def read(self) -> list[float]:
        """The marks since the last reading, from the first on."""
        marks, self._marks = self._marks, []
        if not self._on_gpu:
            return [mark - marks[0] for mark in marks]
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) for mark in marks]
