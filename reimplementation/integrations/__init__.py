"""Other people's models on our ops, by one call: see `accelerate`."""

from .acceleration import Left, Replaced, Report, accelerate, accelerated

__all__ = ["Left", "Replaced", "Report", "accelerate", "accelerated"]
