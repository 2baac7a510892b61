"""Work beside other work, in a CUDA graph that is being recorded."""

from __future__ import annotations

import torch


class Branch:
    """A part of a graph that runs beside what is recorded after this object was made, until `join`.

    The kernels of one head are too small to fill a GPU, so that two heads side by side take little longer than one.
    Outside of a recording, calls are in turn as always: there the host is what takes the time.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device):
        is_recording = (
            device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
        )
        self._stream: torch.cuda.Stream | None = None
        if is_recording:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._within = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        """Record what is within into the branch."""
        if self._stream is not None:
            self._within.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._stream is not None:
            self._within.__exit__(*raised)

    def join(self) -> None:
        """Let what is recorded from here on wait for the branch."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
