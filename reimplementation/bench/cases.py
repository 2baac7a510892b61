"""What the benchmark can time: an op on inputs of a size, the whole module around it, and the host's part of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench import modules
from reimplementation.bench.feature_aggregation import FeatureAggregationInputs, feature_aggregation_inputs
from reimplementation.bench.floor import measure_floor
from reimplementation.bench.gathers import gathers
from reimplementation.bench.graphed import Graphed
from reimplementation.bench.inputs import (
    AggregationInputs,
    AggregationProblem,
    AttentionInputs,
    AttentionProblem,
    DiscreteAttentionInputs,
    OpInputs,
    UnfusedAttentionProblem,
    aggregation_inputs,
    aggregation_problem,
    attention_inputs,
    attention_problem,
    discrete_attention_inputs,
)
from reimplementation.bench.memory import extra_memory, kept_memory
from reimplementation.bench.peers import PEER_PASSES, PEERS, peer_steps
from reimplementation.bench.results import FLOOR
from reimplementation.bench.steps import ATTN_DROP, OP_PASSES, OPS, call, op_of, op_step
from reimplementation.bench.timing import Timing, measure, measure_host

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
OF_CUDA_ALONE = ("forward warm", "backward deterministic")
MODULE_PASSES = (
    "forward",
    "forward graph",
    "forward graphed",
    "forward compiled",
    "training",
    "training graph",
    "training graphed",
    "training compiled",
)
HOST_PASSES = ("call no_grad", "call inference_mode", "call forward", "call backward", "call training")
PASSES = tuple(dict.fromkeys(OP_PASSES + MODULE_PASSES + HOST_PASSES))
ROTATED_BYTES = 256 * 2**20  # inputs that are rotated through: several times a GPU's L2


@dataclass(frozen=True)
class Figures:
    """What came out of a pass; see `results.Result`."""

    timing: Timing
    gathered_bytes: int | None = None
    extra_bytes: int | None = None
    kept_bytes: int | None = None


class Prepared(Protocol):
    """A case whose inputs lie on the device."""

    def measure(self, backend: str, passed: str, repeats: int) -> Figures | None:
        """Time one pass on a backend; None where that backend cannot run these inputs."""


class Case(Protocol):
    """Something to time."""

    def passes(self, backend: str) -> tuple[str, ...]:
        """The passes that a backend has; "floor" and the names of peers count as backends."""

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Prepared:
        """Make the inputs: features in ``dtype``, everything on ``device``."""


@dataclass(frozen=True)
class OpCase:
    """An op alone.

    inputs: its operands.
    make_inputs: makes them; takes ``dtype``, ``device`` and ``seed``.
    """

    inputs: type[OpInputs]
    make_inputs: Callable[..., OpInputs]

    def passes(self, backend: str) -> tuple[str, ...]:
        if backend == FLOOR:
            return ("forward",)
        if backend in PEERS:
            return PEER_PASSES if PEERS[backend].inputs is self.inputs else ()
        if not OPS[self.inputs].has_kernels(backend):  # it has no backward of its own
            return ("forward", "training")
        return tuple(p for p in OP_PASSES if backend == "cuda" or p not in OF_CUDA_ALONE)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> PreparedOp:
        first = self.make_inputs(dtype=dtype, device=device)
        features = next(iter(first))
        copies = ROTATED_BYTES // (features.numel() * features.element_size()) if device.type == "cuda" else 0
        return PreparedOp([first] + [self.make_inputs(dtype=dtype, device=device, seed=1 + i) for i in range(copies)])


@dataclass(frozen=True)
class PreparedOp:
    """Inputs of an op; on CUDA several, larger than the L2 together, so that none is found there but in a warm pass."""

    inputs: list[OpInputs]

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs[0])).device

    @cached_property
    def gathered_bytes(self) -> int:
        return gathers(self.inputs[0]).gathered_bytes

    def measure(self, backend: str, passed: str, repeats: int) -> Figures | None:
        if backend == FLOOR:
            timing = measure_floor([gathers(inputs) for inputs in self.inputs], self.device, repeats)
            return None if timing is None else Figures(timing, self.gathered_bytes)
        if backend in PEERS:
            return self._figures(peer_steps(backend, self.inputs, passed), passed, repeats)
        with ops.use_backend(backend), _deterministic() if passed == "backward deterministic" else nullcontext():
            rotated = self.inputs[:1] if passed == "forward warm" else self.inputs
            return self._figures([op_step(inputs, backend, passed) for inputs in rotated], passed, repeats)

    def _figures(self, steps: list[Callable[[], object]], passed: str, repeats: int) -> Figures:
        timing = measure(steps, self.device, repeats)
        gathered = self.gathered_bytes if passed == "forward" else None
        return Figures(timing, gathered, extra_memory(steps[0], self.device))


@dataclass(frozen=True)
class ModuleCase:
    """The whole module around an op; half precision runs under autocast.

    attn_drop: its attention dropout, which is at work in every pass.
    """

    make_problem: Callable[[], AggregationProblem | AttentionProblem]
    attn_drop: float = 0.0

    def passes(self, backend: str) -> tuple[str, ...]:
        if backend == FLOOR or backend in PEERS:
            return ()
        return MODULE_PASSES if backend == "cuda" else ("forward", "training")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> PreparedModule:
        problem = self.make_problem().to(device, dtype)
        if self.attn_drop > 0:
            module: Any = problem.module
            module.attn_drop = self.attn_drop
            module.train()
        return PreparedModule(problem, dtype, device)


@dataclass(frozen=True)
class PreparedModule:
    """One batch of inputs: what the module itself reads and writes takes their place in the caches."""

    problem: AggregationProblem | AttentionProblem
    dtype: torch.dtype
    device: torch.device

    def measure(self, backend: str, passed: str, repeats: int) -> Figures:
        what, _, how = passed.partition(" ")
        problem: modules.Called = self.problem
        if how == "compiled":
            compiled: Any = torch.compile(self.problem.module)
            problem = replace(self.problem, module=compiled)
        is_training = what == "training"
        with (
            modules.running(modules.Case(str(self.device), backend, self.dtype)),
            torch.set_grad_enabled(is_training),
        ):
            if how == "graphed":
                problem = Graphed.made_of(self.problem)
            step = modules.training_step(problem) if is_training else problem.forward
            timing = measure([step], self.device, repeats, graph=how == "graph")
            if how == "graphed":  # what graphs need they hold already
                return Figures(timing)
            kept_bytes = kept_memory(problem.forward, self.device) if is_training else None
            return Figures(timing, extra_bytes=extra_memory(step, self.device), kept_bytes=kept_bytes)


@dataclass(frozen=True)
class HostCase:
    """What the host does for one call of an op, at a size at which the device has next to nothing to do."""

    make_inputs: Callable[..., OpInputs]

    def passes(self, backend: str) -> tuple[str, ...]:
        return () if backend in (FLOOR, "triton", "grid_sample", *PEERS) else HOST_PASSES

    def prepare(self, dtype: torch.dtype, device: torch.device) -> PreparedCalls:
        return PreparedCalls(self.make_inputs(dtype=dtype, device=device))


@dataclass(frozen=True)
class PreparedCalls:
    """Inputs of a call. The backend is not forced: it is the device's own, and choosing it is part of the call."""

    inputs: OpInputs

    def measure(self, backend: str, passed: str, repeats: int) -> Figures:
        device = next(iter(self.inputs)).device
        forward, leaves = call(op_of(self.inputs).function, self.inputs, records=True)
        grad_output = torch.ones_like(forward())

        def backward(output: Tensor) -> None:
            torch.autograd.grad(output, leaves, grad_output)

        if passed == "call backward":
            return Figures(measure_host(backward, device, repeats, prepare=forward))
        if passed == "call training":
            return Figures(measure_host(lambda _: backward(forward()), device, repeats))
        without = {"call no_grad": torch.no_grad, "call inference_mode": torch.inference_mode}
        with without.get(passed, nullcontext)():
            return Figures(measure_host(lambda _: forward(), device, repeats))


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MAP: dict[str, Any] = {"num_queries": 100, "num_points": 300}  # SparseDrive's second head
PLANNER: dict[str, Any] = {"num_queries": 1024, "num_points": 500}

CASES: dict[str, Case] = {
    "rig-bs1": OpCase(AggregationInputs, partial(aggregation_inputs, "rig", 1)),
    "rig-bs6": OpCase(AggregationInputs, partial(aggregation_inputs, "rig", 6)),
    "rig-small": OpCase(AggregationInputs, partial(aggregation_inputs, num_queries=100, channels=64, strides=(16, 32))),
    "dense-bs1": OpCase(AggregationInputs, partial(aggregation_inputs, "dense", 1)),
    "dense-bs6": OpCase(AggregationInputs, partial(aggregation_inputs, "dense", 6)),
    "map-bs1": OpCase(AggregationInputs, partial(aggregation_inputs, "map", 1, **MAP)),
    "map-bs6": OpCase(AggregationInputs, partial(aggregation_inputs, "map", 6, **MAP)),
    "planner-bs1": OpCase(AggregationInputs, partial(aggregation_inputs, "planner", 1, **PLANNER)),
    "fused-rig-bs1": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "rig", 1)),
    "fused-rig-bs1-drop": OpCase(
        FeatureAggregationInputs, partial(feature_aggregation_inputs, "rig", 1, attn_drop=ATTN_DROP)
    ),
    "fused-rig-bs6": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "rig", 6)),
    "fused-dense-bs1": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "dense", 1)),
    "fused-dense-bs6": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "dense", 6)),
    "fused-map-bs1": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "map", 1, **MAP)),
    "fused-map-bs6": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "map", 6, **MAP)),
    "fused-planner-bs1": OpCase(FeatureAggregationInputs, partial(feature_aggregation_inputs, "planner", 1, **PLANNER)),
    "msda-encoder": OpCase(AttentionInputs, partial(attention_inputs, "encoder")),
    "msda-encoder-bs1": OpCase(AttentionInputs, partial(attention_inputs, "encoder", 1)),
    "msda-decoder": OpCase(AttentionInputs, partial(attention_inputs, "decoder")),
    "msda-decoder-discrete": OpCase(DiscreteAttentionInputs, partial(discrete_attention_inputs, "decoder")),
    "msda-paper": OpCase(AttentionInputs, partial(attention_inputs, "paper")),
    "msda-small": OpCase(AttentionInputs, partial(attention_inputs, "small-encoder")),
    "module-bs1": ModuleCase(partial(aggregation_problem, batch_size=1)),
    "module-bs1-drop": ModuleCase(partial(aggregation_problem, batch_size=1), ATTN_DROP),
    "module-bs6": ModuleCase(partial(aggregation_problem, batch_size=6)),
    "module-bs6-drop": ModuleCase(partial(aggregation_problem, batch_size=6), ATTN_DROP),
    "attention-layer": ModuleCase(attention_problem),
    "attention-layer-unfused": ModuleCase(partial(attention_problem, kind=UnfusedAttentionProblem)),
    "overhead-aggregation": HostCase(
        partial(aggregation_inputs, num_queries=1, num_points=1, channels=8, strides=(32,))
    ),
    "overhead-fused": HostCase(
        partial(feature_aggregation_inputs, num_queries=1, num_points=1, channels=8, strides=(32,))
    ),
    "overhead-msda": HostCase(partial(attention_inputs, "one-query")),
}
DEFAULT_CASES = {
    "cuda": [case for case in CASES if case not in ("rig-small", "msda-encoder-bs1", "msda-small")],
    "cpu": [
        "rig-bs1",
        "dense-bs1",
        "map-bs1",
        "fused-rig-bs1",
        "msda-encoder-bs1",
        "msda-decoder",
        "module-bs1",
        "overhead-aggregation",
        "overhead-msda",
    ],
}
