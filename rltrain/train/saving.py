"""Writing of models and checkpoints, and requests to stop a run."""

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

from rltrain.checkpoint.background_push import BackgroundPush
from rltrain.checkpoint.background_save import BackgroundSave
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import RunState
from rltrain.errors import UserError
from rltrain.interrupt import end_by_signal, interrupt, is_launched, say
from rltrain.reward.inside.kernel import die_with_parent
from rltrain.types.samples import ScoredGroup

# exit code of a run that SIGTERM or Ctrl-C ended with a checkpoint; a shell reports 143 for a process that
# the signal killed
STOPPED = 3
_REPEAT_SECONDS = 5.0  # a further signal within this time repeats the first request
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO})


class Stopped(Exception):
    """The run was asked to stop, and ended after a step with a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.checkpoint = checkpoint


class WithoutWorkers(Exception):
    """No worker samples any more. checkpoint: of the last whole step; None: no step was whole."""

    def __init__(self, step: int, checkpoint: Path | None, reason: str) -> None:
        saved = "nothing is lost, no step was taken" if checkpoint is None else f"saved in {checkpoint}"
        super().__init__(f"{reason}. The run ends after step {step}: {saved}")


class EvaluationResult(Protocol):
    """An evaluation of any kind."""

    @property
    def groups(self) -> Sequence[ScoredGroup]:
        """The completions that it sampled and graded; empty if it sampled none."""
        ...

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
    """Writes models into the run folder.

    write(out, step, results, state) writes a model; with a state, the model is a checkpoint. snapshot(step,
    evaluations) returns that state. Every rank calls the methods: gathering weights and states is a
    collective. background: writes checkpoints of which each rank writes its parts; None: they are whole.
    pushes: checkpoints to the Hub, on the main process; None: pushes none.
    """

    folder: RunFolder
    write: Callable[[Path, int, Mapping[str, float], RunState | None], Path]
    snapshot: Callable[[int, Sequence[Mapping[str, float]]], RunState]
    keep: int  # number of the latest checkpoints that stay
    main: bool  # rank 0, which writes and removes
    background: BackgroundSave | None = None
    pushes: BackgroundPush | None = None

    def checkpoint(self, step: int, scores: EvaluationHistory) -> Path:
        """Writes ``checkpoints/step-N``, a model folder with the state of the run, then removes all but the
        latest ``keep`` checkpoints. A sharded one is whole under its name at the next call, or after
        ``wait``.
        """
        state = self.snapshot(step, scores.all)
        out = self.folder.checkpoint(step)
        if self.background is not None:
            self.background.start(out, state)
            return out
        self.write(out, step, scores.metrics(), state)
        if self.main:
            self.folder.prune_checkpoints(self.keep)
        if self.pushes is not None:
            self.pushes.start(out, step)
        return out

    def final(self, step: int, scores: EvaluationHistory) -> Path:
        """Writes the finished model."""
        self.wait()
        return self.write(self.folder.model, step, scores.metrics(), None)

    def wait(self) -> None:
        """Returns when the last checkpoint is written. Raises OSError where a disk refused."""
        if self.background is not None:
            self.background.wait()

    def close(self) -> None:
        """Ends the thread that writes."""
        if self.background is not None:
            self.background.close()


@contextlib.contextmanager
def disk_errors(folder: RunFolder) -> Iterator[None]:
    """Turns the error of a disk that is full, gone or read-only into a UserError that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS:
            raise
        present = folder.present_checkpoints()
        safe = f"{present[-1][1]} is whole and stays" if present else "there is no checkpoint yet"
        raise UserError(
            f"run folder {folder.path} cannot be written: {error}. {safe}; make room, or the disk writable, "
            "and give the same command again"
        ) from error


@contextlib.contextmanager
def stop_with_the_launcher() -> Iterator[None]:
    """Inside, the end of the launcher is a SIGTERM to this process, on Linux only.

    Some launchers, such as ``accelerate launch`` with a single process, do not pass a SIGTERM on. A process
    that has stopped and is about to end is no longer concerned: enter it inside ``record_stop_signals``.
    """
    # accelerate sets the variable in every process that it starts
    if sys.platform != "linux" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        yield
        return
    die_with_parent(signal.SIGTERM)
    try:
        yield
    finally:
        die_with_parent(None)


@dataclass
class TimeLimit:
    """Ends a run in time for a scheduler's limit. Call it once after every step: whether another step, as
    long as the longest so far, would end too late. started: of the process, in ``clock``'s time.
    """

    seconds: float
    started: float
    clock: Callable[[], float] = time.time
    longest: float = 0.0
    _last: float | None = None

    def __call__(self) -> bool:
        now = self.clock()
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now
        return now - self.started + self.longest > self.seconds


@dataclass
class StopRequest:
    """Whether and how this process was asked to stop. Calling the object returns whether.

    limit: of the run's time, asked at every call.
    """

    signals: list[tuple[float, signal.Signals]] = field(default_factory=list)  # (time.monotonic(), signal)
    in_loop: bool = False  # the run takes steps, so that it can write a checkpoint after the current one
    limit: TimeLimit | None = None
    is_late: bool = False
    parent: int = field(default_factory=os.getppid)  # a launcher's process, or a shell's

    def __call__(self) -> bool:
        self.is_late = self.is_late or (self.limit is not None and self.limit())
        return bool(self.signals) or self.is_late

    @property
    def cause(self) -> str:
        """The first signal, or the limit; on a rank without either, the signal that launchers send."""
        if not self.signals:
            return "train.max_hours" if self.is_late else "SIGTERM"
        return "Ctrl-C" if self.signals[0][1] is signal.SIGINT else self.signals[0][1].name

    def handle(self, number: int, *_: object) -> None:
        """Handles SIGTERM, SIGUSR1 and SIGINT. Raises Interrupted at a Ctrl-C before the first step."""
        received = signal.Signals(number)
        if received is signal.SIGINT and not self.in_loop:
            interrupt()
        if received is signal.SIGTERM and os.getppid() != self.parent:
            self.parent = os.getppid()
            if self.signals:  # the launcher ended of what this process was asked before, however long it took
                return
        self.signals.append((time.monotonic(), received))
        if self._is_second_request():
            end_by_signal(received)
        elif received is signal.SIGINT and len(self.signals) == 1:
            say(
                "Ctrl-C: the run stops after the step in hand and writes a checkpoint, from which the same "
                "command continues; a second Ctrl-C ends it at once, back at the last checkpoint"
            )

    def _is_second_request(self) -> bool:
        """Whether the last signal is a second request, not the first one that arrived again, nor one that a
        SIGUSR1 announced.
        """
        requests = [entry for entry in self.signals if entry[1] is not signal.SIGUSR1]
        if len(requests) < 2 or self.signals[-1][1] is signal.SIGUSR1:
            return False
        presses = sum(number is signal.SIGINT for _, number in requests)
        if presses > 1 and requests[-1][1] is signal.SIGINT and not is_launched():
            return True  # without a launcher only the terminal sends SIGINT
        return requests[-1][0] - requests[0][0] > _REPEAT_SECONDS


@contextlib.contextmanager
def record_stop_signals(limit: TimeLimit | None = None) -> Iterator[StopRequest]:
    """Records a SIGTERM, SIGUSR1 or Ctrl-C in the ``with`` block, so that the loop can stop after the step; a
    second one ends the process at once.

    Stopping a job signals all its processes, and the launcher among them passes the signal on to its ranks,
    so that a single request arrives twice. Signals within ``_REPEAT_SECONDS`` therefore count as one, except
    for a second Ctrl-C without a launcher. Before the first step Ctrl-C raises Interrupted. Outside the main
    thread Python allows no handler, and nothing is recorded.
    """
    request = StopRequest(limit=limit)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # a background job of a shell ignores Ctrl-C, and continues to do so
    ignores_interrupt = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = [signal.SIGTERM, signal.SIGUSR1, *([] if ignores_interrupt else [signal.SIGINT])]
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
