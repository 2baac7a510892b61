"""The backend ``triton``: kernels that Triton compiles where they run, for CUDA and ROCm devices without ``cuda``.

PyTorch brings Triton along, so these kernels need neither our extension nor nvcc. There is a module an op, for the ops
that sample; any other op is arithmetic on points, and runs its formula.

Importing Triton, and with it PyTorch's compiler, takes seconds, so it waits until somebody asks whether this backend
can serve. Only then are the operators defined: what `_register.define` left with `when_loaded` runs.

Where the environment variable ``TRITON_INTERPRET=1`` was set before, Triton interprets the kernels instead, on the CPU
and in NumPy. Then this backend serves CPU tensors, if it is forced: that is for tests, as it takes ages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module

import torch

from ..backend import Backend, Missing
from ..native import constant_in_graphs

__all__ = ["NAMESPACE", "OPS", "TRITON", "when_loaded"]

NAMESPACE = "reimplementation_triton"
"""Of the operators: ``torch.ops.reimplementation_triton.deformable_aggregation``, say."""

OPS = (
    "deformable_aggregation",
    "deformable_feature_aggregation",
    "ms_deform_attn",
    "ms_deform_attn_from_offsets",
)
"""The ops that have kernels here, a module each."""

OLDEST = (3, 6)
OLDEST_CAPABILITY = (7, 0)  # of an NVIDIA GPU; below, Triton compiles nothing (torch._inductor refuses it likewise)

_Define = Callable[[Callable, Callable], None]
_waiting: dict[str, _Define] = {}
_answers: dict[str | int, Missing | None] = {}  # of Triton, and of GPUs by index


def when_loaded(name: str, define: _Define) -> None:
    """Have ``define(forward, backward)`` called with the kernels' launchers as soon as Triton is there.

    Ops without kernels here are not called back.
    """
    if name in OPS:
        _waiting[name] = define


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python; it looks at the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(device: torch.device) -> Missing | None:
    if not (torch.version.cuda or torch.version.hip or is_interpreted()):
        return Missing(f"PyTorch {torch.__version__} is a build without CUDA and ROCm")
    return _why_not_triton() or (None if device.index is None else _why_not_gpu(device.index))


@constant_in_graphs
def _why_not_triton() -> Missing | None:
    """Import Triton and define the operators, once; why that was not possible."""
    if "triton" not in _answers:
        _answers["triton"] = _load()
    return _answers["triton"]


@constant_in_graphs
def _why_not_gpu(index: int) -> Missing | None:
    """Why not on the GPU of that index. It is asked for its compute capability once; that waits for nothing."""
    if index not in _answers:
        _answers[index] = _look_at_gpu(index)
    return _answers[index]


def _load() -> Missing | None:
    try:
        import triton
    except ImportError as error:
        return Missing(f"Triton cannot be imported: {error}; install it with: pip install triton")
    oldest = ".".join(map(str, OLDEST))
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST:
        return Missing(
            f"Triton {triton.__version__} is too old; install a newer one with: pip install 'triton>={oldest}'"
        )
    for name, define in _waiting.items():
        module = import_module(f"{__name__}.{name}")
        define(module.forward, module.backward)
    return None


def _look_at_gpu(index: int) -> Missing | None:
    if is_interpreted():
        return Missing("TRITON_INTERPRET=1 has Triton interpret its kernels, on the CPU alone")
    if torch.version.cuda is None or not torch.cuda.is_available():  # ROCm, or tensors without memory
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    has, needs = ("{}.{}".format(*numbers) for numbers in (capability, OLDEST_CAPABILITY))
    return Missing(f"cuda:{index} has compute capability {has}, and Triton needs {needs}")


TRITON = Backend("triton", "cuda", _why_not, may_be_forced_on=lambda device: device.type == "cpu" and is_interpreted())
