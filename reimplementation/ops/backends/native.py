"""The backends ``cuda`` and ``cpu``: the kernels of the extension module ``reimplementation._C``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from reimplementation._installation import hidden_installation

from .backend import Backend, Missing

BUILD_COMMAND = "pip install ."

_PACKAGE = Path(__file__).resolve().parents[2]
_Function = TypeVar("_Function", bound=Callable)


def constant_in_graphs(function: _Function) -> _Function:
    """Let a compiler call the function while it traces a graph, and take what it returns for a constant.

    This attribute is all that `torch.compiler.assume_constant_result` sets, after a second of importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _recorded_build() -> dict:
    """What the build wrote down about itself; empty when the package was never built."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_extension() -> tuple[str, Missing | None]:
    """Import the extension: the CUDA architectures in it ("" for none), and why it is missing (None if it is not)."""
    try:
        from reimplementation import _C
    except ImportError as error:
        if (_PACKAGE / "_C.abi3.so").exists():
            reason = f"reimplementation._C does not load: {error}"
        elif hidden := hidden_installation(_PACKAGE):
            return "", Missing(hidden)
        else:
            reason = _recorded_build().get("reasons", {}).get("cpu") or "reimplementation._C is not built"
        return "", Missing(reason, BUILD_COMMAND)
    return _C.cuda_architectures, None


_architectures, _extension_missing = _load_extension()
_gpus: dict[int, Missing | None] = {}  # by device index, filled by `_why_not_gpu`

EXTENSION_AVAILABLE = _extension_missing is None
"""Whether the extension module is loaded; its CPU kernels are then there."""

CUDA_EXT_AVAILABLE = bool(_architectures) and torch.version.cuda is not None
"""Whether the extension holds CUDA kernels that this PyTorch can launch (a GPU need not be present)."""


def build_info() -> dict:
    """The state of the extension.

    Returns a dict: ``cpu`` and ``cuda`` (bool: the kernels are there), ``reasons`` (for each that is not, a
    sentence saying why), ``architectures`` (list of str), ``file`` (path or None), and what the build recorded
    of its tools (``torch``, ``nvcc``, ``compiler``; absent if the package was never built).
    """
    recorded = _recorded_build()
    why = {"cpu": _why_not_cpu(torch.device("cpu")), "cuda": _why_not_cuda(torch.device("cuda"))}
    return {
        "cpu": EXTENSION_AVAILABLE,
        "cuda": CUDA_EXT_AVAILABLE,
        "reasons": {name: missing.reason for name, missing in why.items() if missing is not None},
        "architectures": _architectures.split(),
        "file": str(_PACKAGE / "_C.abi3.so") if EXTENSION_AVAILABLE else None,
        **{key: recorded[key] for key in ("torch", "nvcc", "compiler") if key in recorded},
    }


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a GPU can run code compiled for ``architectures``.

    Machine code runs on GPUs of the same major compute capability and the same or a higher minor one, PTX on any later
    GPU too; code for an architecture with the suffix ``a`` on that very one alone, with ``f`` within the same major.
    (CUDA C++ Programming Guide, "Compute Capabilities".)

    Args:
        capability: the GPU's (major, minor).
        architectures: entries like "8.6", "9.0a" or "12.0+PTX", as in TORCH_CUDA_ARCH_LIST.
    """
    for entry in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"an architecture must read like 8.6, 9.0a or 12.0+PTX; got {entry!r}")
        major, minor, suffix, ptx = match.groups()
        built = int(major), int(minor)
        if suffix == "a":
            fits = capability == built
        else:
            fits = capability >= built and (capability[0] == built[0] or bool(ptx and not suffix))
        if fits:
            return True
    return False


def _why_not_cpu(device: torch.device) -> Missing | None:
    return _extension_missing


def _why_not_cuda(device: torch.device) -> Missing | None:
    if not EXTENSION_AVAILABLE:
        return _extension_missing
    if CUDA_EXT_AVAILABLE:
        return None if device.index is None else _why_not_gpu(device.index)
    if not _architectures:
        reason = _recorded_build().get("reasons", {}).get("cuda")
        return Missing(reason or "the extension was built without CUDA kernels", BUILD_COMMAND)
    return Missing(f"PyTorch {torch.__version__} is a build without CUDA", BUILD_COMMAND)


@constant_in_graphs
def _why_not_gpu(index: int) -> Missing | None:
    """Why not on the GPU of that index. It is asked for its compute capability once; that waits for nothing."""
    if index not in _gpus:
        _gpus[index] = _compare_with_gpu(index)
    return _gpus[index]


def _compare_with_gpu(index: int) -> Missing | None:
    if not torch.cuda.is_available():  # tensors without memory, such as those of torch.export
        return None
    capability = torch.cuda.get_device_capability(index)
    if runs_on(capability, _architectures.split()):
        return None
    number = "{}.{}".format(*capability)
    return Missing(
        f"cuda:{index}, {torch.cuda.get_device_name(index)}, has compute capability {number}, and the extension was "
        f"built for {_architectures}",
        f"TORCH_CUDA_ARCH_LIST={number} {BUILD_COMMAND}",
    )


CUDA = Backend("cuda", "cuda", _why_not_cuda)
CPU = Backend("cpu", "cpu", _why_not_cpu)
