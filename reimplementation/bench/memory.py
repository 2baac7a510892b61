"""How much memory a step takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def extra_memory(step: Callable[[], object], device: torch.device | str) -> int | None:
    """Run a step; the most bytes that it held at once beyond what was there before, None if unknown.

    On CUDA, what PyTorch allocated; on the CPU, what the process held in memory, in pages.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Freed memory that the C library keeps would be used again and not be counted, so hand it back first.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    resident = _reset_resident_peak()
    step()
    return None if resident is None else _resident_peak() - resident


def kept_memory(forward: Callable[[], Tensor], device: torch.device | str) -> int | None:
    """The bytes that a forward leaves for its backward, the output not counted; None where no one counts them."""
    if torch.device(device).type != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    output = forward()
    return torch.cuda.memory_allocated(device) - before - output.numel() * output.element_size()


def _reset_resident_peak() -> int | None:
    """Start the process's peak resident size afresh and return it; None where there is no Linux /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_peak()
    except OSError:
        return None


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = status.split("VmHWM:")[1].split()[0]
    return int(kibibytes) * 1024
