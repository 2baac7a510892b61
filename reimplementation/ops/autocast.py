"""Autocast kept away from what must not be rounded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast casts nothing on a device.

    Where it casts nothing anyway there is nothing to enter, for the host to spend time on and for a tracer to record;
    for tensors on "meta" there is no autocast at all.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
