"""Level 4: Triton. We say what one program does with tiles of numbers; Triton decides which thread has which number.

The kernels are those of the backend ``triton``, `reimplementation.ops.backends.triton`: one forward and one backward an
op. Nothing is written to memory but the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.inputs import OpInputs
from reimplementation.bench.steps import op_of

BACKEND = "triton"


def why_not(device: torch.device) -> str | None:
    """Kernels that NumPy interprets are right, and no level of anything."""
    if device.type != "cuda":
        return "Triton compiles kernels for GPUs"
    return ops.backends.why_not(BACKEND, device)


def prepare(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op on these levels, as a function of features, locations and weights."""
    return forced(BACKEND, inputs)


def forced(backend: str, inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op of the package on one of its backends."""
    function = op_of(inputs).function
    _, shapes, starts, _, _ = inputs

    def call(features: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        with ops.use_backend(backend):
            return function(features, shapes, starts, locations, weights)

    return call
