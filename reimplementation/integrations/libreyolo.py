"""Our op in the slot that libreyolo has for it, where its models look unless they are compiled or exported.

This reaches models of which `accelerate` knows no module. Those that it knows gain more by it, since it replaces more
than the op, and they can be compiled and exported with it.
"""

from __future__ import annotations

from torch import Tensor

from reimplementation import ops

SLOT, NAME = "ms_deform_attn", "reimplementation"


def fill_slot() -> None:
    """Put the op into the slot, ahead of libreyolo's own.

    Raises:
        ModuleNotFoundError: libreyolo is not installed.
    """
    from libreyolo import kernels

    kernels.resolve(SLOT)  # loads what it has itself; the last to be registered comes first
    kernels.unregister(SLOT, NAME)
    kernels.register(SLOT, attend, name=NAME)


def empty_slot() -> None:
    """Undo `fill_slot`."""
    from libreyolo import kernels

    kernels.unregister(SLOT, NAME)


def attend(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """The op, from what the slot hands in: no first rows, and a value of any strides."""
    return ops.ms_deform_attn(value, spatial_shapes, None, sampling_locations, attention_weights)
