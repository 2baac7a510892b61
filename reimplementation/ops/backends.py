"""Which backend runs an op, and why.

``cuda`` and ``cpu`` are the kernels of the extension module ``reimplementation._C``; ``grid_sample`` is plain
PyTorch and always there. The best one for the tensors' device runs unless `use_backend` or the environment
variable ``REIMPLEMENTATION_BACKEND`` (read at import) names another. A GPU for which the extension holds no code runs
``grid_sample`` too: it is recognised before a launch could fail. So do ``torch.func`` transforms, which know how to
transform nothing else.
"""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import forward_ad

BACKENDS = ("cuda", "cpu", "grid_sample")
BUILD_COMMAND = "pip install --no-build-isolation ."

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class _Missing:
    """Why there are no kernels for a device, and the command that builds them."""

    reason: str
    remedy: str = BUILD_COMMAND

    def __str__(self) -> str:
        return f"{self.reason}. To build it: {self.remedy}"


def _load_extension() -> tuple[str, str | None]:
    """Import the extension: the CUDA architectures in it ("" for none), and why it is missing (None if it is not)."""
    try:
        from reimplementation import _C
    except ImportError as error:
        if (_PACKAGE / "_C.abi3.so").exists():
            return "", f"reimplementation._C does not load: {error}"
        return "", _recorded_build().get("reasons", {}).get("cpu") or "reimplementation._C is not built"
    return _C.cuda_architectures, None


def _recorded_build() -> dict:
    """What the build wrote down about itself; empty when the package was never built."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


_cuda_architectures, _extension_missing = _load_extension()

EXTENSION_AVAILABLE = _extension_missing is None
"""Whether the extension module is loaded; its CPU kernels are then there."""

CUDA_EXT_AVAILABLE = bool(_cuda_architectures) and torch.version.cuda is not None
"""Whether the extension holds CUDA kernels that this PyTorch can launch (a GPU need not be present)."""


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()
_forced_by_environment = os.environ.get("REIMPLEMENTATION_BACKEND") or None
_warned: set[str] = set()
_best: dict[torch.device, str] = {}  # filled by `_best_backend`
_gpus: dict[int, _Missing | None] = {}  # by device index, filled by `_missing_on_gpu`


def build_info() -> dict:
    """The state of the extension.

    Returns a dict: ``cpu`` and ``cuda`` (bool: the kernels are there), ``reasons`` (for each that is not, a
    sentence saying why), ``architectures`` (list of str), ``file`` (path or None), and what the build recorded
    of its tools (``torch``, ``nvcc``, ``compiler``; absent if the package was never built).
    """
    recorded = _recorded_build()
    return {
        "cpu": EXTENSION_AVAILABLE,
        "cuda": CUDA_EXT_AVAILABLE,
        "reasons": {name: missing.reason for name in ("cpu", "cuda") if (missing := _missing(name))},
        "architectures": _cuda_architectures.split(),
        "file": str(_PACKAGE / "_C.abi3.so") if EXTENSION_AVAILABLE else None,
        **{key: recorded[key] for key in ("torch", "nvcc", "compiler") if key in recorded},
    }


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that can run tensors of ``device``, best first. ``"cuda"`` stands for the current GPU."""
    device = torch.device(device)
    return ([device.type] if why_missing(device) is None else []) + ["grid_sample"]


def why_missing(device: torch.device | str) -> str | None:
    """Why ``device`` runs `grid_sample` alone, and the command that changes it; None if it has kernels.

    A GPU lacks them also where the extension was built for other compute capabilities. ``"cuda"`` stands for the
    current GPU.
    """
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    missing = _missing(device.type, index)
    return None if missing is None else str(missing)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for this thread's calls within the ``with`` block.

    Args:
        name: "cuda", "cpu" or "grid_sample".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here; raised on entry, saying why and how to get it. Where it is
            available on some GPUs, a call with tensors on another raises it.
    """
    _require(name)
    previous = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def select_backend(device: torch.device, op: str = "Deformable aggregation") -> str:
    """The backend that runs a call of ``op`` on tensors of ``device``; warns once when a kernel is missing."""
    forced = _forced.name or _forced_by_environment
    if forced is None:
        return "grid_sample" if _is_transformed() else _best_backend(device)
    _require(forced, op, device.index)
    if forced in ("cuda", "cpu") and device.type not in (forced, "meta"):
        raise RuntimeError(f"backend {forced!r} is forced, but the tensors are on {device}: move them to {forced}")
    if forced != "grid_sample" and _is_transformed():
        raise RuntimeError(
            f"backend {forced!r} is forced, but torch.func transforms and forward-mode derivatives need grid_sample"
        )
    return forced


def is_traced() -> bool:
    """Whether a compiler or an exporter is recording the call."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work.

    PyTorch differentiates registered kernels in reverse mode alone: `torch.func.grad` refuses them, and forward mode
    takes their output for a constant without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _best_backend(device: torch.device) -> str:
    """What `select_backend` returns where none is forced: every call asks, so it is worked out once for each device."""
    if device not in _best:
        _best[device] = _choose(device)
    return _best[device]


def _choose(device: torch.device) -> str:
    if device.type == "meta":
        return "cpu" if EXTENSION_AVAILABLE else "grid_sample"
    missing = _missing(device.type, device.index)
    if missing is None:
        return device.type
    message = f"running on grid_sample, which is slower: no {device.type} kernels: {missing}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=7)  # where the op was called
    return "grid_sample"


def _missing(device_type: str, index: int | None = None) -> _Missing | None:
    """What is missing for this kind of device, or on one GPU; None if nothing is."""
    if device_type not in ("cuda", "cpu"):
        return _Missing(f"the extension is written for cpu and cuda, not for {device_type}")
    if not EXTENSION_AVAILABLE:
        return _Missing(_extension_missing)
    if device_type == "cpu":
        return None
    if CUDA_EXT_AVAILABLE:
        return None if index is None else _missing_on_gpu(index)
    if not _cuda_architectures:
        return _Missing(
            _recorded_build().get("reasons", {}).get("cuda") or "the extension was built without CUDA kernels"
        )
    return _Missing(f"PyTorch {torch.__version__} is a build without CUDA")


@torch.compiler.assume_constant_result
def _missing_on_gpu(index: int) -> _Missing | None:
    """`_missing` for the GPU of that index. It is asked for its compute capability once; that waits for nothing."""
    if index not in _gpus:
        _gpus[index] = _compare_with_gpu(index)
    return _gpus[index]


def _compare_with_gpu(index: int) -> _Missing | None:
    if not torch.cuda.is_available():  # tensors without memory, such as those of torch.export
        return None
    capability = torch.cuda.get_device_capability(index)
    if runs_on(capability, _cuda_architectures.split()):
        return None
    number = "{}.{}".format(*capability)
    return _Missing(
        f"cuda:{index}, {torch.cuda.get_device_name(index)}, has compute capability {number}, and the extension was "
        f"built for {_cuda_architectures}",
        f"TORCH_CUDA_ARCH_LIST={number} {BUILD_COMMAND}",
    )


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
        major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry).groups()
        built = int(major), int(minor)
        if suffix == "a":
            fits = capability == built
        else:
            fits = capability >= built and (capability[0] == built[0] or bool(ptx and not suffix))
        if fits:
            return True
    return False


def _require(name: str, op: str = "Deformable aggregation", index: int | None = None) -> None:
    """Raises unless the backend is there: on one GPU, or where ``index`` is None on any."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "grid_sample":
        return
    missing = _missing(name, index)
    if missing is None and name == "cuda" and index is None:
        gpus = [_missing_on_gpu(gpu) for gpu in range(torch.cuda.device_count())]
        missing = next(iter(gpus), None) if all(gpus) else None
    if missing is not None:
        raise RuntimeError(f"{op} {name.upper()} extension is not available: {missing}")
