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
from rltrain.interrupt import end_by_signal, interrupt, is_launched, say

# exit code of a run that SIGTERM or Ctrl-C ended with a checkpoint; a shell's 143 is of a process that just
# died of the signal
STOPPED = 3
_ONE_STOP = 5.0  # seconds in which every further signal is the first one again
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO})


class Stopped(Exception):
    """The run was asked to stop and ended after a step, with a checkpoint of it."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.checkpoint = step, checkpoint


class EvaluationResult(Protocol):
    """An evaluation, of whatever kind."""

    def metrics(self) -> dict[str, float]: ...


@dataclass
class EvaluationHistory:
    """The evaluations of a run, first to last, as numbers by name."""

    all: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, result: EvaluationResult | None) -> None:
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

    write(out, step, results, state) makes one; with a state, it is a checkpoint. snapshot(step, evaluations)
    is that state. Every rank calls the methods: gathering weights and states is a collective.
    """

    folder: RunFolder
    write: Callable[[Path, int, Mapping[str, float], RunState | None], Path]
    snapshot: Callable[[int, Sequence[Mapping[str, float]]], RunState]
    keep: int  # checkpoints, the latest
    main: bool  # rank 0, the one that writes and removes

    def checkpoint(self, step: int, scores: EvaluationHistory) -> Path:
        """``checkpoints/step-N``, a model folder with the state of the run; what is older than the
        latest ``keep`` goes after it.
        """
        out = self.write(
            self.folder.checkpoint(step), step, scores.metrics(), self.snapshot(step, scores.all)
        )
        if self.main:
            self.folder.prune_checkpoints(self.keep)
        return out

    def final(self, step: int, scores: EvaluationHistory) -> Path:
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
            f"run folder {folder.path} cannot be written: {error}. {safe}; make room, or the disk writable, "
            "and give the same command again"
        ) from error


def stop_with_the_launcher() -> None:
    """The end of a launcher that passes no SIGTERM on, as ``accelerate launch`` of one process, is one too.

    On Linux only.
    """
    if (
        sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):  # accelerate sets it, whatever it starts
        die_with_parent(signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and how. Called, it says so."""

    came: list[tuple[float, signal.Signals]] = field(default_factory=list)  # (time.monotonic(), what)
    in_loop: bool = False  # steps are taken, after which a checkpoint can be written

    def __call__(self) -> bool:
        return bool(self.came)

    @property
    def by(self) -> str:
        """What asked first; on a rank that heard nothing, what launchers send."""
        return "Ctrl-C" if self.came and self.came[0][1] is signal.SIGINT else "SIGTERM"

    def handle(self, number: int, *_: object) -> None:
        """A signal handler for both. Raises Interrupted where Ctrl-C comes before the first step."""
        came = signal.Signals(number)
        if came is signal.SIGINT and not self.in_loop:
            interrupt()
        self.came.append((time.monotonic(), came))
        if self._is_another():
            end_by_signal(came)
        elif came is signal.SIGINT and len(self.came) == 1:
            say(
                "Ctrl-C: the run stops after the step in hand and writes a checkpoint; a second one ends it "
                "at once"
            )

    def _is_another(self) -> bool:
        """Whether the last signal is a second request, and not the first on another way."""
        if len(self.came) == 1:
            return False
        pressed = sum(number is signal.SIGINT for _, number in self.came)
        if pressed > 1 and self.came[-1][1] is signal.SIGINT and not is_launched():
            return True  # nobody but the terminal sends it
        return self.came[-1][0] - self.came[0][0] > _ONE_STOP


@contextlib.contextmanager
def stops_noted() -> Iterator[StopRequest]:
    """Inside, a SIGTERM or a Ctrl-C is noted, for the loop to stop after the step in hand; a second one ends
    the process at once.

    Who stops a job signals every process of it, and the launcher among them passes that on to its ranks: one
    stop arrives twice. So what comes within ``_ONE_STOP`` seconds is one, but for a second Ctrl-C where no
    launcher is. Before the first step Ctrl-C raises Interrupted. Outside the main thread Python allows no
    handler: there nothing is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a background job of a shell stays one
    numbers = (signal.SIGTERM,) if deaf else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
