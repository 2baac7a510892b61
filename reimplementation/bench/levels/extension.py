"""Level 5: kernels in C++ and CUDA. We say what each thread does, where numbers wait, and in which order they meet.

The kernels are those of the extension, `reimplementation/ops/csrc`: CUDA on a GPU, vectors and threads on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.inputs import OpInputs

from .triton import forced


def why_not(device: torch.device) -> str | None:
    return ops.backends.why_not(device.type, device)


def prepare(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op on these levels, as a function of features, locations and weights."""
    _, shapes, _, _, _ = inputs
    return forced(shapes.device.type, inputs)
