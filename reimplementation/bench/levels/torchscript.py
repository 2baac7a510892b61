"""Level 2: TorchScript. The same functions, compiled to a program of PyTorch's own that runs without Python.

The operators are the same, and so is what they read and write: `grid_sample` is not among those that TorchScript's
fuser knows. What is saved is Python between the operators. PyTorch has deprecated it, and says so here as everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from reimplementation.bench.inputs import OpInputs

from . import eager


def why_not(device: torch.device) -> str | None:
    return None


def prepare(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op on these levels, as a function of features, locations and weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DeprecationWarning)  # Python would keep it to itself
        return eager.bind(torch.jit.script(eager.function_of(inputs)), inputs)
