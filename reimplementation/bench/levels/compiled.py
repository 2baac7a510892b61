"""Level 3: torch.compile. Inductor sees the whole function, forward and backward, and writes kernels for it.

From `eager`: Inductor writes the forward of `grid_sample` out as index arithmetic, which it can then fuse with weights
and sums; for its backward it calls PyTorch's own kernel, an island between the kernels that it writes.

From `reimplementation.ops.backends.gather`, which says the same with a gather and products: there the backward, too, is
arithmetic and a scatter that Inductor can write.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reimplementation.bench.inputs import AggregationInputs, OpInputs
from reimplementation.ops.backends import gather

from . import eager


def why_not(device: torch.device) -> str | None:
    return None


def prepare(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The op on these levels, as a function of features, locations and weights."""
    return _compile(eager.prepare(inputs))


def prepare_gathers(inputs: OpInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same from written-out gathers."""
    function = gather.deformable_aggregation if isinstance(inputs, AggregationInputs) else gather.ms_deform_attn
    _, shapes, starts, _, _ = inputs
    return _compile(lambda features, locations, weights: function(features, shapes, starts, locations, weights))


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # lest it count what was compiled before as recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)
