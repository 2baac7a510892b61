"""What lets other packages be imported where a compiled library of theirs is missing.

torchvision's wheel from PyPI is built for a PyTorch with CUDA: beside a CPU build its library does not load, and its
Python code fails where it adds to an operator of that library. mmcv-lite has no library at all, and looks for the
functions in it. Neither is called by the modules that the tests use, so names of them are enough.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch


def import_or_skip(name: str, minversion: str | None = None) -> types.ModuleType:
    """The module, with stand-ins for what it cannot load; skips where its package is not installed, or is older."""
    package = name.partition(".")[0]
    _name_operators_of_torchvision()
    pytest.importorskip(package, minversion, f"needs the package {package}; see `make test-clients`")
    if package == "mmcv":
        sys.modules.setdefault("mmcv._ext", _AnyFunction("mmcv._ext"))
    return importlib.import_module(name)


class _AnyFunction(types.ModuleType):
    """A module that has every name, and nothing that can be called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _name_operators_of_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
