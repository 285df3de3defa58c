"""Ctrl-C outside of a training loop: the program ends with a line and no traceback, as if the signal had
killed it.

Inside the loop the first Ctrl-C is a request to stop after the step in hand (``rltrain.train.saving``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["Interrupted", "die_of", "ends_at_ctrl_c", "interrupt", "is_launched", "resuming_command", "say"]


class Interrupted(BaseException):
    """Ctrl-C came.

    Not a KeyboardInterrupt, which libraries take for theirs; not an Exception, which code takes for an error.
    """


@contextlib.contextmanager
def ends_at_ctrl_c() -> Iterator[None]:
    """Inside, the first Ctrl-C closes what is open and then ends the process, a second one ends it at once.

    A process that was started deaf to it, as a shell's background jobs are, stays so. Outside the main thread
    Python allows no handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Interrupted:
        say("interrupted")
        die_of(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(*_: object) -> NoReturn:
    """A handler that unwinds the main thread; the next Ctrl-C finds none."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Interrupted


def die_of(number: signal.Signals) -> None:
    """End this process as the signal does where nobody handles it, so that a shell or a launcher sees
    what it sent.
    """
    with contextlib.suppress(
        OSError, RuntimeError
    ):  # a closed pipe; a write of the stream's own that the signal came into
        sys.stdout.flush()
        sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def say(line: str) -> None:
    """On the terminal, rank 0 only.

    Safe in a signal handler, where a stream may be in the middle of a write of its own.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


def is_launched() -> bool:
    """Whether ``accelerate launch`` or torchrun started this process: a terminal signals them, and
    they pass it on.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def resuming_command(arguments: Sequence[str]) -> str:
    """What continues the run that ``rltrain`` was started for with these ``sys.argv``: the same, from
    the run's own checkpoint.
    """
    program, *words = arguments
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith("--resume="):
            kept.append(word)
        skip = word == "--resume"
        if skip:
            kept.pop()
    name = ["python", "-m", "rltrain"] if Path(program).name == "__main__.py" else [Path(program).name]
    prefix = "accelerate launch ... -m rltrain" if is_launched() else shlex.join(name)
    return f"{prefix} {shlex.join(kept)}"
