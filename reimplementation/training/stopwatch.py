"""Where the time of a step goes, by the device's own clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds of phases that follow one another.

    On a GPU a phase lasts from the moment when the GPU has done all before it until it has done its own work, and
    nothing is waited for: the times can be read once the host has waited for the GPU anyway.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def ends(self, phase: str) -> None:
        """A phase ends here, which began where the one before it ended."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """The seconds of every phase since the last reading; the device has done all of them."""
        seconds: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:]):
            passed = before.elapsed_time(after) / 1e3 if self._is_cuda else after - before
            seconds[phase] = seconds.get(phase, 0.0) + passed
        del self._marks[:-1]
        return seconds

    def _now(self) -> Any:
        """A moment: seconds, or an event of a GPU."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
