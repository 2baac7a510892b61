"""Which backend runs an op, and why.

``cuda`` and ``cpu`` are the kernels of the extension; ``triton`` has kernels for GPUs that are compiled where they run;
``grid_sample`` is plain PyTorch and always there. The best one for the tensors' device runs, unless `use_backend` or
the environment variable ``REIMPLEMENTATION_BACKEND`` (read at import) names another. A GPU for which the extension
holds no code is recognised before a launch could fail, and runs the next best. ``torch.func`` transforms run
``grid_sample``: they know how to transform nothing else.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps

import torch
from torch.autograd import forward_ad

from .backend import Backend, Missing
from .native import CPU, CUDA, CUDA_EXT_AVAILABLE, EXTENSION_AVAILABLE, build_info, constant_in_graphs
from .triton import TRITON

__all__ = [
    "BACKENDS",
    "CUDA_EXT_AVAILABLE",
    "EXTENSION_AVAILABLE",
    "available_backends",
    "build_info",
    "constant_in_graphs",
    "select_backend",
    "use_backend",
    "why_missing",
    "why_not",
]

GRID_SAMPLE = Backend("grid_sample", None, lambda device: None)
_IN_ORDER = (CUDA, TRITON, CPU, GRID_SAMPLE)  # the best first
_BY_NAME = {backend.name: backend for backend in _IN_ORDER}

BACKENDS = tuple(_BY_NAME)
"""The names of all backends, the best first."""


_forced: ContextVar[str | None] = ContextVar("forced backend", default=None)
# What `_forced` holds, for compilers: Dynamo reads no ContextVar, but compiles anew when this changes. Of a subclass
# with a default, older releases would see nothing but the default.
_forced_in_graphs = threading.local()
_forced_by_environment = os.environ.get("REIMPLEMENTATION_BACKEND") or None
_warned: set[str] = set()
_best: dict[torch.device, str] = {}  # filled by `_best_backend`


class use_backend:
    """Force one backend for the calls within a ``with`` block, or within a function that this decorates.

    Other threads and other asyncio tasks are left alone. (A compiled function follows what its thread forced last: if
    tasks of one thread take turns within such blocks, that may be another task's backend.)

    Args:
        name: "cuda", "triton", "cpu" or "grid_sample".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here; the message says why and how to get it. Where it is
            available on some GPUs, a call with tensors on another raises it.
    """

    _is_used = True  # nothing is to be said of an object that __init__ refused

    def __init__(self, name: str):
        _require(name)
        self.name = name
        self._is_used = False
        self._before: list = []  # what is undone: tokens of `_forced`, or in a graph names

    def __enter__(self) -> None:
        self._is_used = True
        in_graph = torch.compiler.is_compiling()
        self._before.append(_name_in_graphs() if in_graph else _forced.set(self.name))
        _forced_in_graphs.name = self.name

    def __exit__(self, *exception: object) -> None:
        if torch.compiler.is_compiling():
            _forced_in_graphs.name = self._before.pop()
        else:
            _forced.reset(self._before.pop())
            _forced_in_graphs.name = _forced.get()

    def __call__(self, function: Callable) -> Callable:
        self._is_used = True

        @wraps(function)
        def decorated(*args, **kwargs):
            with use_backend(self.name):
                return function(*args, **kwargs)

        return decorated

    def __del__(self) -> None:
        if not self._is_used:
            message = f"use_backend({self.name!r}) does nothing by itself: write `with use_backend({self.name!r}):`"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that can run tensors of ``device``, best first. ``"cuda"`` stands for the current GPU."""
    device = _with_index(torch.device(device))
    return [backend.name for backend in _IN_ORDER if backend.serves(device)]


def why_not(name: str, device: torch.device | str) -> str | None:
    """Why the backend of that name cannot run tensors of ``device``; None where it can."""
    device, backend = _with_index(torch.device(device)), _BY_NAME[name]
    if backend.device_type not in (None, device.type):
        return f"{name} is for {backend.device_type}, not for {device.type}"
    missing = backend.why_not(device)
    return None if missing is None else str(missing)


def why_missing(device: torch.device | str) -> str | None:
    """Why ``device`` runs `grid_sample` alone, and the command that changes it; None if it has kernels.

    A GPU lacks them also where the extension was built for other compute capabilities. ``"cuda"`` stands for the
    current GPU.
    """
    missing = _missing(_with_index(torch.device(device)))
    return None if missing is None else str(missing)


def select_backend(device: torch.device, op: str = "Deformable aggregation", in_graph: bool = False) -> str:
    """The backend that runs a call of ``op`` on tensors of ``device``; warns once when a kernel is missing.

    ``in_graph``: a compiler is tracing the call.
    """
    forced = (_name_in_graphs() if in_graph else _forced.get()) or _forced_by_environment
    if forced is None:
        return GRID_SAMPLE.name if _is_transformed() else _best_backend(device)
    _require(forced, op, device.index)
    if forced == GRID_SAMPLE.name:
        return forced
    backend = _BY_NAME[forced]
    if device.type not in (backend.device_type, "meta") and not backend.may_be_forced_on(device):
        raise RuntimeError(
            f"backend {forced!r} is forced, but the tensors are on {device}: move them to {backend.device_type}"
        )
    if _is_transformed():
        raise RuntimeError(
            f"backend {forced!r} is forced, but torch.func transforms and forward-mode derivatives need grid_sample"
        )
    return forced


def _name_in_graphs() -> str | None:
    return getattr(_forced_in_graphs, "name", None)


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work.

    PyTorch differentiates registered kernels in reverse mode alone: `torch.func.grad` refuses them, and forward mode
    takes their output for a constant without a word.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@constant_in_graphs
def _best_backend(device: torch.device) -> str:
    """What `select_backend` returns where none is forced: every call asks, so it is worked out once for each device."""
    if device not in _best:
        _best[device] = _choose(device)
    return _best[device]


def _choose(device: torch.device) -> str:
    if device.type == "meta":  # any kernel's operator serves tensors without memory
        return CPU.name if EXTENSION_AVAILABLE else GRID_SAMPLE.name
    best = next(backend for backend in _IN_ORDER if backend.serves(device))  # none after it is asked: some take seconds
    if best is not GRID_SAMPLE:
        return best.name
    message = f"running on grid_sample, which is slower: no {device.type} kernels: {_missing(device)}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=6)  # where the op was called
    return GRID_SAMPLE.name


def _missing(device: torch.device) -> Missing | None:
    """What keeps the best kernels for this kind of device from running on it; None if there are others that do."""
    kernels = [backend for backend in _IN_ORDER if backend.device_type == device.type]
    if not kernels:
        return Missing(f"the extension is written for cpu and cuda, not for {device.type}")
    if any(backend.serves(device) for backend in kernels):
        return None
    return kernels[0].why_not(device)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _require(name: str, op: str = "Deformable aggregation", index: int | None = None) -> None:
    """Raises unless the backend is there: on one GPU, or where ``index`` is None on any."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    missing = _why_nowhere(name) if index is None else _BY_NAME[name].why_not(torch.device("cuda", index))
    if missing is not None:
        what = "backend" if name == TRITON.name else "extension"
        raise RuntimeError(f"{op} {name.upper()} {what} is not available: {missing}")


@constant_in_graphs
def _why_nowhere(name: str) -> Missing | None:
    """Why no device here is served by that backend; None where one is."""
    backend = _BY_NAME[name]
    if backend.device_type is None:
        return None
    missing = backend.why_not(torch.device(backend.device_type))
    if missing is None and backend.device_type == "cuda":
        gpus = [backend.why_not(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        missing = next(iter(gpus), None) if all(gpus) else None
    return missing
