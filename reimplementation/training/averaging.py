"""The average of parameters over the steps of a training, which often judges better than the last of them (EMA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WARMUP = 10.0  # steps: an average of few steps forgets faster than it will later


class ParameterAverage:
    """An exponential moving average of a model's parameters; its buffers are averages of their own.

    Args:
        model: whose parameters it begins with.
        decay: what the average keeps of itself in a step, in [0, 1); in early steps less, (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._parameters = dict(model.named_parameters())
        self._values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after a step, the first of which is 0."""
        decay = min(self._decay, (1 + step) / (WARMUP + step))
        torch._foreach_lerp_(list(self._values.values()), list(self._parameters.values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names."""
        return dict(self._values)

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name, value in self._values.items():
            value.copy_(values[name])
