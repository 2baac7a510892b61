"""The levels in their order, and the inputs that they are timed on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.inputs import OpInputs, aggregation_inputs, attention_inputs
from reimplementation.bench.steps import op_of
from reimplementation.ops.backends import gather

from . import compiled, eager, extension, torchscript, triton

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS = Path(ops.__file__).parent / "csrc"
TRITON_KERNELS = Path(ops.__file__).parent / "backends" / "triton"
FOLDERS = {"deformable_aggregation": "aggregation", "ms_deform_attn": "attention"}  # of an op, in csrc


@dataclass(frozen=True)
class Level:
    """A way to write the op.

    prepare: of inputs, the op as a function of features, locations and weights.
    why_not: why a device has no such level; None where it has.
    lines: how many lines of an op's own code there are for a device; None where the sources are not there.
    """

    number: int
    name: str
    prepare: Callable[[OpInputs], Call]
    why_not: Callable[[torch.device], str | None]
    lines: Callable[[OpInputs, torch.device], int | None]


def _lines_of(text: str) -> int:
    """Lines that are neither empty nor a comment."""
    return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "//")))


def _of_function(module: ModuleType, inputs: OpInputs, device: torch.device) -> int:
    return _lines_of(inspect.getsource(getattr(module, op_of(inputs).name)))


def _of_gathers(inputs: OpInputs, device: torch.device) -> int:
    return _lines_of(inspect.getsource(gather))


def _of_files(paths: list[Path]) -> int | None:
    return sum(_lines_of(path.read_text()) for path in paths) if paths else None


def _of_triton(inputs: OpInputs, device: torch.device) -> int | None:
    """The op's own file, and those that it shares with other kernels of Triton."""
    name = op_of(inputs).name
    files = (name, f"{FOLDERS[name]}_samples", "footprint")
    return _of_files([TRITON_KERNELS / f"{file}.py" for file in files])


def _of_extension(inputs: OpInputs, device: torch.device) -> int | None:
    """The op's own files, and on a GPU those of the features' gradient, which the two ops share."""
    if device.type == "cpu":
        return _of_files(sorted((KERNELS / FOLDERS[op_of(inputs).name]).glob("*cpu*")))
    folders = (FOLDERS[op_of(inputs).name], "feature_gradient")
    return _of_files([path for folder in folders for path in sorted((KERNELS / folder).glob("*.cu*"))])


LEVELS = (
    Level(1, "eager", eager.prepare, eager.why_not, partial(_of_function, eager)),
    Level(2, "TorchScript", torchscript.prepare, torchscript.why_not, partial(_of_function, eager)),
    Level(3, "torch.compile", compiled.prepare, compiled.why_not, partial(_of_function, eager)),
    Level(3, "torch.compile, gathers", compiled.prepare_gathers, compiled.why_not, _of_gathers),
    Level(4, "Triton", triton.prepare, triton.why_not, _of_triton),
    Level(5, "C++ and CUDA", extension.prepare, extension.why_not, _of_extension),
)

_CASES: dict[str, dict[str, Callable[..., OpInputs]]] = {  # by op and device type
    "aggregation": {
        "cuda": partial(aggregation_inputs, "rig", 1),
        "cpu": partial(aggregation_inputs, "rig", 1, num_queries=300, channels=128, strides=(16, 32)),
    },
    "attention": {"cuda": partial(attention_inputs, "encoder"), "cpu": partial(attention_inputs, "decoder", 1)},
}
OPS = tuple(_CASES)


def inputs_of(op: str, device: torch.device) -> OpInputs:
    """Of the sizes of a detector on a GPU; smaller on a CPU, where plain PyTorch would take seconds a call.

    Locations are odd multiples of 2^-13, so that pixel positions are exact in float32, and none lies on the edge of a
    pixel: there the gradient jumps, and errors would tell how often that happens.
    """
    inputs = _CASES[op][device.type](device=device)
    locations = fields(inputs)[3].name
    return replace(inputs, **{locations: ((getattr(inputs, locations) * 2**12).floor() + 0.5) / 2**12})
