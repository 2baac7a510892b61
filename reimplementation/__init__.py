"""Fused deformable sampling for multi-camera perception: the ops, and the modules built on them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import models, ops

__version__ = "0.1.0"
__all__ = ["__version__", "models", "ops"]


def __getattr__(name: str) -> ModuleType:
    """Import `ops` or `models` when it is first asked for: both need PyTorch, and importing that takes a while."""
    if name in ("models", "ops"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
