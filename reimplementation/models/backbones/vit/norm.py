"""The normalisations by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weights: autocast has a rule for LayerNorm, and none for it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(norm_type: str, size: int, eps: float | None = EPS, **factory: Any) -> nn.Module:
    """A normalisation over the last axis, of ``size`` channels.

    Args:
        norm_type: "rmsnorm" (arXiv 1910.07467) or "layernorm" (arXiv 1607.06450).
        size: channels.
        eps: of RMSNorm; None: the smallest step of the input's dtype. LayerNorm has 1e-5 always.
        factory: ``device`` and ``dtype`` of the weights.
    """
    if norm_type == "rmsnorm":
        return RMSNorm(size, eps=eps, **factory)
    return nn.LayerNorm(size, eps=EPS, **factory)
