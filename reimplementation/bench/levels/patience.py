"""A limit to what is waited for: a compiler may take longer than anybody wants to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(BaseException):
    """Raised in what takes too long. It is no `Exception`, which compilers wrap in others or hide."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the block after that many seconds.

    Python interrupts itself in its main thread alone, where the system can set an alarm; elsewhere there is no limit.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
