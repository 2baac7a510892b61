"""The activations by name, plain and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def squared_relu(x: Tensor) -> Tensor:
    """Primer's activation (arXiv 2109.08668)."""
    return F.relu(x).square()


def open_silu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), gpt-oss's gate: nearly GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "srelu": squared_relu,
    "reglu": F.relu,  # of a GLU, the activation of its gate (arXiv 2002.05202)
    "swiglu": F.silu,
    "geglu": F.gelu,
    "openswiglu": open_silu,
}


def is_glu(activation: str) -> bool:
    """Whether the activation halves the channels: a linear half times an activated gate."""
    return activation.endswith("glu")


def gated(
    hidden: Tensor, activate: Callable[[Tensor], Tensor], limit: float | None = None, extra_bias: float | None = None
) -> Tensor:
    """A gated linear unit.

    Args:
        hidden: (..., 2 C): the linear half, then the gate.
        activate: of the gate.
        limit: clamps the gate from above and the linear half on both sides.
        extra_bias: added to the linear half after that. With openswiglu, a limit of 7 and a bias of 1 this is
            gpt-oss's MLP.

    Returns:
        (..., C): ``activate(gate) * linear``.
    """
    linear, gate = hidden.chunk(2, -1)
    if limit is not None:
        gate = gate.clamp(max=limit)
        linear = linear.clamp(-limit, limit)
    if extra_bias is not None:
        linear = linear + extra_bias
    return activate(gate) * linear
