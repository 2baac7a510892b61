"""Which backend runs an op, and why.

``cuda`` and ``cpu`` are the kernels of the extension module ``reimplementation._C``; ``grid_sample`` is plain
PyTorch and always there. The best one for the tensors' device runs unless `use_backend` or the environment
variable ``REIMPLEMENTATION_BACKEND`` (read at import) names another.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

BACKENDS = ("cuda", "cpu", "grid_sample")
BUILD_COMMAND = "pip install --no-build-isolation ."

_PACKAGE = Path(__file__).resolve().parent.parent


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

_forced = threading.local()
_forced_by_environment = os.environ.get("REIMPLEMENTATION_BACKEND") or None
_warned: set[str] = set()


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
        "reasons": {name: reason for name in ("cpu", "cuda") if (reason := _missing_reason(name))},
        "architectures": _cuda_architectures.split(),
        "file": str(_PACKAGE / "_C.abi3.so") if EXTENSION_AVAILABLE else None,
        **{key: recorded[key] for key in ("torch", "nvcc", "compiler") if key in recorded},
    }


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that can run tensors of ``device``, best first."""
    kind = torch.device(device).type
    return ([kind] if kind in ("cuda", "cpu") and _missing_reason(kind) is None else []) + ["grid_sample"]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for this thread's calls within the ``with`` block.

    Args:
        name: "cuda", "cpu" or "grid_sample".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here; raised on entry, saying why and how to get it.
    """
    _require(name)
    previous = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def select_backend(device: torch.device, op: str = "Deformable aggregation") -> str:
    """The backend that runs a call of ``op`` on tensors of ``device``; warns once when a kernel is missing."""
    if torch.onnx.is_in_onnx_export():
        return "grid_sample"  # ONNX knows no kernel of ours
    forced = getattr(_forced, "name", None) or _forced_by_environment
    if forced is not None:
        _require(forced, op)
        if forced in ("cuda", "cpu") and device.type not in (forced, "meta"):
            raise RuntimeError(f"backend {forced!r} is forced, but the tensors are on {device}: move them to {forced}")
        return forced
    if device.type == "meta":
        return "cpu" if EXTENSION_AVAILABLE else "grid_sample"
    reason = _missing_reason(device.type)
    if reason is None:
        return device.type
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"running on grid_sample, which is slower: no {device.type} kernels: {reason}. "
            f"To build them: {BUILD_COMMAND}",
            RuntimeWarning,
            stacklevel=3,
        )
    return "grid_sample"


def _missing_reason(device_type: str) -> str | None:
    """Why the extension has no kernels for this kind of device; None if it has."""
    if device_type not in ("cuda", "cpu"):
        return f"the extension is written for cpu and cuda, not for {device_type}"
    if not EXTENSION_AVAILABLE:
        return _extension_missing
    if device_type == "cpu" or CUDA_EXT_AVAILABLE:
        return None
    if not _cuda_architectures:
        return _recorded_build().get("reasons", {}).get("cuda") or "the extension was built without CUDA kernels"
    return f"PyTorch {torch.__version__} is a build without CUDA"


def _require(name: str, op: str = "Deformable aggregation") -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name != "grid_sample" and (reason := _missing_reason(name)):
        raise RuntimeError(f"{op} {name.upper()} extension is not available: {reason}. To build it: {BUILD_COMMAND}")
