"""The MLP of a transformer layer, with its norm before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .activations import ACTIVATIONS, gated, is_glu
from .initialization import init_layers
from .norm import make_norm


class NormMLP(nn.Module):
    """Norm, linear layer, activation, dropout, linear layer, dropout.

    Args:
        hidden_size: C.
        ffn_hidden_size: channels after the activation. A GLU's first layer has twice as many.
        activation: a name in `activations.ACTIVATIONS`.
        dropout: after the activation and of the output.
        bias: whether the linear layers have biases.
        norm_type: see `norm.make_norm`.
        glu_limit, glu_extra_bias: see `activations.gated`.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: str = "srelu",
        dropout: float = 0.0,
        bias: bool = True,
        norm_type: str = "rmsnorm",
        glu_limit: float | None = None,
        glu_extra_bias: float | None = None,
        **factory: Any,
    ):
        super().__init__()
        self.activation = activation
        self.glu_limit = glu_limit
        self.glu_extra_bias = glu_extra_bias
        self.norm = make_norm(norm_type, hidden_size, **factory)
        self.fc1 = nn.Linear(hidden_size, ffn_hidden_size * (2 if is_glu(activation) else 1), bias=bias, **factory)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden_size, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        init_layers(self.fc1, self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C), without the residual."""
        hidden = self.fc1(self.norm(x))
        activate = ACTIVATIONS[self.activation]
        if is_glu(self.activation):
            hidden = gated(hidden, activate, self.glu_limit, self.glu_extra_bias)
        else:
            hidden = activate(hidden)
        return self.dropout(self.fc2(self.dropout(hidden)))
