"""A module as two CUDA graphs, of its forward and of its backward, which is called as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reimplementation.bench.modules import Timed


@dataclass(frozen=True, eq=False)
class Graphed:
    """What is timed in the place of a module with its inputs."""

    of: Timed
    called: Callable[..., Tensor]

    @classmethod
    def made_of(cls, of: Timed) -> Graphed:
        """Record both graphs (`torch.cuda.make_graphed_callables`); all inputs that can have gradients get them.

        From here on autocast keeps no weights that it has cast: those would be no part of the graphs.
        """
        torch.set_autocast_cache_enabled(False)
        for leaf in of.leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            called: Any = torch.cuda.make_graphed_callables(OfLeaves(of), of.leaves)
        return cls(of, called)

    @property
    def module(self) -> nn.Module:
        return self.of.module

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.of.leaves

    def forward(self) -> Tensor:
        return self.called(*self.leaves)


class OfLeaves(nn.Module):
    """A module that takes the inputs that have gradients, for graphs want tensors alone; the other inputs stay."""

    def __init__(self, of: Timed):
        super().__init__()
        self.module, self.of = of.module, of

    def forward(self, *leaves: Tensor) -> Tensor:
        return self.of.at(*leaves).forward()
