"""How a branch joins the residual: layer scale, and drop path that computes the branch on the kept samples alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # 20 * (1 - 0.9) is a little below 2, and means 2


class LayerScale(nn.Module):
    """A learned factor for each channel (arXiv 2103.17239).

    Args:
        size: channels.
        initial: of every factor.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, size: int, initial: float, **factory: Any):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((size,), initial, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def add_branch(x: Tensor, branch: Callable[[Tensor, Tensor | None], Tensor], drop_path_rate: float = 0.0) -> Tensor:
    """``x + branch(x)``, where a share of the samples skips the branch (stochastic depth, arXiv 1603.09382).

    The branch is computed on ``int(B * (1 - drop_path_rate))`` of the B samples, at least one, drawn anew in each call;
    what it returns is scaled by B over their number, which keeps the expectation. So the work shrinks with the rate, as
    in DINOv2 (arXiv 2304.07193). A single sample never skips.

    Args:
        x: (B, S, C).
        branch: from tokens of some samples, and the samples' numbers (None: all of them), to tokens of that shape.
        drop_path_rate: in [0, 1); 0 outside of training.
    """
    if drop_path_rate == 0:  # before the batch is looked at, which an exporter may leave open
        return x + branch(x, None)
    batch = x.shape[0]
    kept = max(1, int(batch * (1 - drop_path_rate) + ROUNDING))
    if kept == batch:
        return x + branch(x, None)
    chosen = torch.randperm(batch, device=x.device)[:kept]
    update = branch(x[chosen], chosen)
    return x.index_add(0, chosen, update.to(x.dtype), alpha=batch / kept)
