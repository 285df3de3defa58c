"""What a run leaves behind, and what it picks up again."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from reward.inside.kernel import die_with_parent
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import RunState
from rltrain.errors import UserError

STOPPED = 3  # exit code of a run that SIGTERM ended with a checkpoint; a shell's 143 is of a process that just died of the signal
_ONE_STOP = 5.0  # seconds in which every further SIGTERM is the first one again
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO})


class Stopped(Exception):
    """SIGTERM came: the run ended after a step, with a checkpoint of it."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by SIGTERM after step {step}; the same command continues from {checkpoint}")


class Measured(Protocol):
    """An evaluation, of whatever kind."""

    def metrics(self) -> dict[str, float]: ...


@dataclass
class Scores:
    """The evaluations of a run, first to last, as numbers by name."""

    all: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, result: Measured | None) -> None:
        if result is not None:
            self.all.append(result.metrics())

    def metrics(self) -> dict[str, float]:
        """First and last, for the model card."""
        if not self.all:
            return {}
        first = {f"{name} (before)": value for name, value in self.all[0].items()}
        return first | dict(self.all[-1])


@dataclass(frozen=True)
class ModelWriter:
    """Puts models where a run keeps them.

    write(out, step, results, state) makes one; with a state, it is a checkpoint. snapshot(step, evaluations) is that state.
    Every rank calls the methods: gathering weights and states is a collective.
    """

    folder: RunFolder
    write: Callable[[Path, int, Mapping[str, float], RunState | None], Path]
    snapshot: Callable[[int, Sequence[Mapping[str, float]]], RunState]
    keep: int  # checkpoints, the latest
    main: bool  # rank 0, the one that writes and removes

    def checkpoint(self, step: int, scores: Scores) -> Path:
        """``checkpoints/step-N``, a model folder with the state of the run; what is older than the latest ``keep`` goes after it."""
        out = self.write(self.folder.checkpoint(step), step, scores.metrics(), self.snapshot(step, scores.all))
        if self.main:
            self.folder.prune_checkpoints(self.keep)
        return out

    def final(self, step: int, scores: Scores) -> Path:
        return self.write(self.folder.model, step, scores.metrics(), None)


@contextlib.contextmanager
def disk_errors(folder: RunFolder) -> Iterator[None]:
    """A disk that is full, gone or read-only is said in one line, with what is safe. Raises UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK:
            raise
        present = folder.present_checkpoints()
        safe = f"{present[-1][1]} is whole and stays" if present else "there is no checkpoint yet"
        raise UserError(
            f"run folder {folder.path} cannot be written: {error}. {safe}; make room, or the disk writable, and give the same command again"
        ) from error


def stop_with_the_launcher() -> None:
    """The end of a launcher that passes no SIGTERM on, as ``accelerate launch`` of one process, is one too. On Linux only."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher sets it, whatever it starts
        die_with_parent(signal.SIGTERM)


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, a SIGTERM is only noted, and the function given says so; one that comes ``_ONE_STOP`` seconds later ends the process at once.

    Who stops a job signals every process of it, and the launcher among them passes that on to its ranks: one stop arrives twice.
    Outside the main thread Python allows no handler: there nothing is ever noted.
    """
    came: list[float] = []

    def note(*_: object) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > _ONE_STOP:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: bool(came)
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
