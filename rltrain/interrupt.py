"""Ctrl-C outside of a training loop: the program prints one line without a traceback and ends as if the
signal had killed it.

Inside the loop the first Ctrl-C is a request to stop after the current step (``rltrain.train.saving``).
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

__all__ = [
    "Interrupted",
    "end_by_signal",
    "exit_on_ctrl_c",
    "interrupt",
    "is_launched",
    "resuming_command",
    "say",
]


class Interrupted(BaseException):
    """The user pressed Ctrl-C.

    Not a KeyboardInterrupt, which libraries handle themselves; not an Exception, which code handles as an
    error.
    """


@contextlib.contextmanager
def exit_on_ctrl_c() -> Iterator[None]:
    """Inside, the first Ctrl-C closes open resources and then ends the process; a second one ends it at once.

    A process that was started with SIGINT ignored, as a shell's background jobs are, goes on ignoring it.
    Outside the main thread this does nothing, because Python allows no signal handler there.
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
        end_by_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(*_: object) -> NoReturn:
    """A signal handler that unwinds the main thread and removes itself, so that the next Ctrl-C kills."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Interrupted


def end_by_signal(number: signal.Signals) -> None:
    """End this process by the default action of the signal, so that a shell or a launcher sees that the
    signal ended it.
    """
    # OSError: a closed pipe. RuntimeError: the signal interrupted a write of the same stream.
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def say(line: str) -> None:
    """Write ``line`` to the terminal, on rank 0 only.

    Safe in a signal handler: it does not use ``sys.stderr``, which the signal may have interrupted in a
    write.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


def is_launched() -> bool:
    """Whether ``accelerate launch`` or torchrun started this process: the terminal signals the launcher,
    which passes the signal on.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def resuming_command(arguments: Sequence[str]) -> str:
    """The command that continues the run which ``rltrain`` was started for with these ``sys.argv``.

    It is the same command without ``--resume``, so that the run goes on from its own checkpoint.
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
