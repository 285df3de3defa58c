"""Every wait has a deadline: a wait beyond it ends the process, with a message that names what and whom the
process waited for.

What advances restarts them (``note_progress``): an engine may take as long as it likes, token by token, and
so may the ranks that wait for it.

One thread watches two things. First, the waits of this process (``waiting``): an engine that stops answering,
a gather that a peer never joins. Second, the other ranks: each writes a heartbeat to a board they share, so
that the death of a rank is noticed even while the others are inside a collective, where none of their Python
code runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import psutil

from rltrain.errors import TemporaryError

EXPIRED = 75  # exit code after a deadline or a lost rank; sysexits calls it EX_TEMPFAIL: try again

# (whom, what) -> a block that must end within the deadline
Deadline = Callable[[str, str], AbstractContextManager[object]]

# A rank's state on the board.
_ALIVE = "alive"
_DONE = "done"  # it finished
_GONE = "gone"  # it failed

# How long after the deadline a process is ended whose interpreter is locked, so that the watchdog's thread
# cannot run.
_LOCKED_UP_SECONDS = 60.0


class _Progress:
    """How often this process has said that its waits advance."""

    count = 0


def note_progress() -> None:
    """Say that what this process waits for has advanced: its waits, and those of the other ranks, have their
    whole deadline again.
    """
    _Progress.count += 1


class Heartbeat(Protocol):
    """A board on which every rank reports that it is alive.

    Its methods raise OSError or RuntimeError when the board itself is out of reach.
    """

    peers: Collection[int]  # the other ranks

    def say(self, text: str) -> None: ...

    def read(self) -> Mapping[int, str]:
        """The other ranks' latest status, without the ranks that have reported none."""
        ...


def no_deadline(whom: str, what: str) -> AbstractContextManager[object]:
    """A ``Deadline`` that never expires, for code that runs outside of a training run."""
    del whom, what
    return contextlib.nullcontext()


@dataclass(frozen=True)
class _Wait:
    whom: str
    what: str
    since: float  # time.monotonic()


@dataclass(frozen=True)
class _Peer:
    status: str  # "<count>/<progress> <state> <what it was doing>"
    since: float  # time.monotonic() when this status was first read

    @property
    def progress(self) -> str:
        return self.status.split(" ", 1)[0].partition("/")[2]

    @property
    def state(self) -> str:
        return self.status.split(" ", 2)[1]

    @property
    def activity(self) -> str:
        return self.status.split(" ", 2)[2]


class Watchdog:
    """Watches while its ``with`` block runs.

    seconds: the deadline of a wait; a rank that is silent for a third of that, or that failed, ends this
    process too. who: this process's name in messages. board: None where there are no other ranks.
    """

    def __init__(self, seconds: float, who: str = "this process", board: Heartbeat | None = None) -> None:
        self._seconds = seconds
        self._who = who
        self._board = board
        self._beat = max(min(2.0, seconds / 30), 0.05)  # seconds between heartbeats, and between checks
        self._silence = max(seconds / 3, 5 * self._beat)
        self._waits: list[_Wait] = []
        self._peers = {
            rank: _Peer(f"0/0 {_ALIVE} starting", time.monotonic()) for rank in (board.peers if board else ())
        }
        self._count = 0
        self._progress = _Progress.count
        self._advanced = -math.inf  # time.monotonic() of the last progress, here or on another rank
        self._cleanups: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rltrain-watchdog", daemon=True)

    @contextlib.contextmanager
    def waiting(self, whom: str, what: str) -> Iterator[None]:
        """Inside, this process waits for ``whom`` to do ``what``.

        Blocks may be nested; each has the whole deadline.
        """
        wait = _Wait(whom, what, time.monotonic())
        with self._lock:
            self._waits.append(wait)
            outermost = len(self._waits) == 1
        if (
            outermost
        ):  # ends even a process whose interpreter is locked, with exit code 1 and without the names
            faulthandler.dump_traceback_later(self._seconds + _LOCKED_UP_SECONDS, exit=True, file=2)
        try:
            yield
        finally:
            with self._lock:
                self._waits.remove(wait)
            if outermost:
                faulthandler.cancel_dump_traceback_later()

    def add_cleanup(self, cleanup: Callable[[], object]) -> None:
        """Call ``cleanup`` when a deadline ends the process, which runs no ``finally`` block.

        It must not wait for anything.
        """
        self._cleanups.append(cleanup)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process as after a missed deadline if ``error`` is a timeout or temporary, or is due to a
        lost peer.
        """
        if isinstance(error, TimeoutError | TemporaryError):
            traceback.print_exception(error)
            self._expire(str(error))
        if isinstance(error, RuntimeError):
            package = type(error).__module__.partition(".")[0]
            if package in ("builtins", "torch"):
                self._expire_if_peer_lost(error)

        self._ended.set()
        self._thread.join()
        self._exchange(f"{_DONE} -" if error is None else f"{_GONE} {type(error).__name__}: {error}")

    # the thread ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(self._beat):
            self._see_progress()
            self._check_waits()
            self._exchange(f"{_ALIVE} {self._activity()}")
            self._check_peers(self._silence)

    def _see_progress(self) -> None:
        if self._progress != _Progress.count:
            self._progress = _Progress.count
            self._restart_waits()

    def _restart_waits(self) -> None:
        with self._lock:
            self._advanced = time.monotonic()
            if self._waits:
                faulthandler.dump_traceback_later(self._seconds + _LOCKED_UP_SECONDS, exit=True, file=2)

    def _check_waits(self) -> None:
        now = time.monotonic()
        with self._lock:
            starts = [(wait, max(wait.since, self._advanced)) for wait in self._waits]
            late = [wait for wait, start in starts if now - start > self._seconds]
        if late:
            wait = late[-1]  # the innermost names most exactly what does not happen
            silent = [f"; {line}" for line in self._lost_peers(3 * self._beat)]
            remedy = "; raise train.deadline_seconds if it may take that long"
            self._expire(
                f"waited {now - wait.since:.0f} s for {wait.whom}: {wait.what}{''.join(silent) or remedy}"
            )

    def _check_peers(self, silence: float) -> None:
        lost = self._lost_peers(silence)
        if lost:
            self._expire("; ".join(lost))

    def _lost_peers(self, seconds: float) -> list[str]:
        """A message for each rank that failed, or gave no sign of life for ``seconds``."""
        now = time.monotonic()
        messages = []
        with self._lock:
            for rank, peer in sorted(self._peers.items()):
                age = now - peer.since
                # Before two beats have passed, this rank may fail for the same reason with a better message.
                if peer.state == _GONE and age > 2 * self._beat:
                    messages.append(f"rank {rank} failed: {peer.activity}")
                elif peer.state == _ALIVE and age > seconds:
                    silence = f"gave no sign of life for {age:.1f} s"
                    messages.append(f"rank {rank} {silence}; its last status was: {peer.activity}")
        return messages

    def _exchange(self, status: str) -> None:
        """Write this rank's ``status`` to the board and read the others'.

        Where the board is out of reach, waits still have their deadlines.
        """
        with self._lock:
            if self._board is None:
                return
            self._count += 1
            try:
                self._board.say(f"{self._count}/{self._progress} {status}")
                statuses = self._board.read()
            except (OSError, RuntimeError) as error:
                self._board = None
                reason = str(error).splitlines()[0]
                sys.stderr.write(f"watchdog: {self._who} cannot reach the other ranks' board: {reason}\n")
                return
            now = time.monotonic()
            changed = {rank: text for rank, text in statuses.items() if self._peers[rank].status != text}
            peers = {rank: _Peer(text, now) for rank, text in changed.items()}
            if any(peer.progress != self._peers[rank].progress for rank, peer in peers.items()):
                self._restart_waits()
            self._peers |= peers

    def _activity(self) -> str:
        with self._lock:
            return f"waiting for {self._waits[-1].whom}: {self._waits[-1].what}" if self._waits else "at work"

    # ends ---------------------------------------------------------------------------------------------------

    def _expire_if_peer_lost(self, error: RuntimeError) -> None:
        """End the process if ``error`` is a collective's timeout, or if a peer turns out to be lost.

        A lost peer shows only after some beats, so this may wait for six of them.
        """
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if "timed out" in reason.lower():
            with self._lock:
                peers = [f"; rank {rank} was {peer.activity}" for rank, peer in sorted(self._peers.items())]
            traceback.print_exception(error)
            self._expire(reason + "".join(peers))
        until = time.monotonic() + 6 * self._beat
        while self._board is not None and time.monotonic() < until:
            time.sleep(self._beat)
            lost = self._lost_peers(3 * self._beat)
            if lost:
                traceback.print_exception(error)
                self._expire(f"{'; '.join(lost)}; here {reason}")

    def _expire(self, reason: str) -> None:
        """Print the reason and every thread's stack, then end this process and those it started."""
        sys.stderr.write(f"deadline: {self._who}: {reason}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)
        with self._lock:
            if self._board is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    self._board.say(f"{self._count + 1}/{self._progress} {_GONE} {reason}")
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        for cleanup in self._cleanups:
            with contextlib.suppress(OSError):
                cleanup()
        os._exit(EXPIRED)
