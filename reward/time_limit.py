"""Limits the CPU time of a block of Python, with a second limit on the wall clock."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType

WALL_CLOCK_FACTOR = 20  # a process that waits so many times longer than it works is stuck, not slow
_AGAIN_SECONDS = 0.1


class TimeUp(BaseException):
    """The time is up. Not an Exception, because math-verify and sympy swallow those."""


@contextlib.contextmanager
def cpu_time_limit(seconds: float, *, wall_clock_seconds: float | None = None) -> Generator[None]:
    """Raises TimeUp inside the block after ``seconds`` of this process's CPU time, so that a verdict does not
    depend on what else the machine does, or after ``wall_clock_seconds`` (20 times as many) on the clock.

    It has no effect outside the main thread, where no signal arrives. Timers that were set before continue
    afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    wall_clock = WALL_CLOCK_FACTOR * seconds if wall_clock_seconds is None else wall_clock_seconds
    armed = True

    def time_is_up(signum: int, frame: FrameType | None) -> None:
        if armed:
            raise TimeUp

    with (
        _timer(signal.ITIMER_REAL, signal.SIGALRM, wall_clock, time_is_up, time.monotonic),
        _timer(signal.ITIMER_PROF, signal.SIGPROF, seconds, time_is_up, time.process_time),
    ):
        try:
            yield
        finally:
            armed = False


@contextlib.contextmanager
def _timer(
    which: int,
    number: int,
    seconds: float,
    handler: Callable[[int, FrameType | None], None],
    clock: Callable[[], float],
) -> Generator[None]:
    before = signal.signal(number, handler)
    started = clock()
    # The timer repeats, because a single exception can be lost where Python ignores exceptions (a destructor,
    # a bare except).
    outer, interval = signal.setitimer(which, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        left = max(outer - (clock() - started), 1e-3) if outer else 0.0
        signal.setitimer(which, left, interval)  # an outer timer continues
        signal.signal(number, before)
