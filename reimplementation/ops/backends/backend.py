"""What a backend is, and what it says where it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Missing:
    """Why a backend cannot serve a device, and the command that changes it, where one does."""

    reason: str
    remedy: str | None = None

    def __str__(self) -> str:
        return self.reason if self.remedy is None else f"{self.reason}. To build it: {self.remedy}"


@dataclass(frozen=True)
class Backend:
    """A way to run the ops.

    name: by which it is forced.
    device_type: whose tensors it takes, "cuda" say; None for any.
    why_not: why it cannot serve a device of its type; None where it can. A device without an index stands for any such.
    may_be_forced_on: whether it takes tensors of a device of another type if it is forced, though it is not chosen.
    """

    name: str
    device_type: str | None
    why_not: Callable[[torch.device], Missing | None]
    may_be_forced_on: Callable[[torch.device], bool] = lambda device: False

    def serves(self, device: torch.device) -> bool:
        return self.device_type in (None, device.type) and self.why_not(device) is None
