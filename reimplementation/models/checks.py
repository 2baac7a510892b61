"""Checks that the modules share: each error names the argument, what was expected and what came."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor


def check_positive(**settings: int) -> None:
    """Raise TypeError unless every setting is an integer, and ValueError unless it is at least 1."""
    for name, value in settings.items():
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer; got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def check_tensors(arguments: dict[str, object]) -> None:
    """Raise TypeError unless every argument, by its name, is a tensor."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(argument).__name__}")
