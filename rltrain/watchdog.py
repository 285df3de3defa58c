"""No wait without an end: what takes longer than its deadline ends the process, saying what and whom it
waited for.

One thread watches two things. Waits of this process (``waiting``): an engine that stops answering, a gather
that a peer never joins. And the other ranks: each puts a sign of life on a board they share, so that a rank
that died while the others are inside a collective, where none of their Python code runs, is missed and named.
"""

from __future__ import annotations

import contextlib
import faulthandler
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

EXPIRED = 75  # exit code after a deadline or a lost rank; sysexits calls it EX_TEMPFAIL: try again

Deadline = Callable[
    [str, str], AbstractContextManager[object]
]  # (whom, what) -> a block that must end within the deadline

_DONE, _GONE = "done", "gone"  # a rank's last words: it finished; it failed
_LOCKED_UP_SECONDS = (
    60.0  # how much later a process is ended whose interpreter is locked, so that no thread of ours runs
)


class Heartbeat(Protocol):
    """Where every rank says that it is alive.

    Raises OSError or RuntimeError when the board itself is out of reach.
    """

    peers: Collection[int]  # the other ranks

    def say(self, text: str) -> None: ...

    def read(self) -> Mapping[int, str]:
        """The other ranks' latest words; nothing of those that never spoke."""
        ...


def no_deadline(whom: str, what: str) -> AbstractContextManager[object]:
    """A ``Waiting`` without a deadline, for what nobody started as a run."""
    del whom, what
    return contextlib.nullcontext()


@dataclass(frozen=True)
class _Wait:
    whom: str
    what: str
    since: float  # time.monotonic()


@dataclass(frozen=True)
class _Peer:
    words: str  # "<count> <state> <what it was doing>"
    since: float  # when these were first read

    @property
    def state(self) -> str:
        return self.words.split(" ", 2)[1]

    @property
    def doing(self) -> str:
        return self.words.split(" ", 2)[2]


class Watchdog:
    """Watches while its ``with`` block runs.

    seconds: the deadline of a wait; a rank that is silent for a third of that, or that failed, ends this
    process too. who: what messages call this process. board: None where there are no other ranks.
    """

    def __init__(self, seconds: float, who: str = "this process", board: Heartbeat | None = None) -> None:
        self._seconds, self._who, self._board = seconds, who, board
        self._beat = max(min(2.0, seconds / 30), 0.05)  # seconds between signs of life, and between looks
        self._silence = max(seconds / 3, 5 * self._beat)
        self._waits: list[_Wait] = []
        self._peers = {
            rank: _Peer("0 alive starting", time.monotonic()) for rank in (board.peers if board else ())
        }
        self._count = 0
        self._last_acts: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rltrain-watchdog", daemon=True)

    @contextlib.contextmanager
    def waiting(self, whom: str, what: str) -> Iterator[None]:
        """Inside, this process waits for ``whom`` to do ``what``.

        May be nested; every level has the whole deadline.
        """
        wait = _Wait(whom, what, time.monotonic())
        with self._lock:
            self._waits.append(wait)
            outermost = len(self._waits) == 1
        if outermost:  # ends a process whose interpreter is locked, with exit code 1 and without the names
            faulthandler.dump_traceback_later(self._seconds + _LOCKED_UP_SECONDS, exit=True, file=2)
        try:
            yield
        finally:
            with self._lock:
                self._waits.remove(wait)
            if outermost:
                faulthandler.cancel_dump_traceback_later()

    def before_the_end(self, act: Callable[[], object]) -> None:
        """``act`` is done when a deadline ends the process, where no ``finally`` of any block is.

        It must not wait for anything.
        """
        self._last_acts.append(act)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What broke because a peer is gone, and what a deadline of its own ended, end like any other
        wait that was too long.
        """
        if isinstance(error, TimeoutError):
            traceback.print_exception(error)
            self._expire(str(error))
        if isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] in (
            "builtins",
            "torch",
        ):
            self._blame(error)
        self._ended.set()
        self._thread.join()
        words = f"{_DONE} -" if error is None else f"{_GONE} {type(error).__name__}: {error}"
        self._exchange(words)

    # the thread ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(self._beat):
            self._look_at_waits()
            self._exchange(f"alive {self._doing()}")
            self._look_at_peers(self._silence)

    def _look_at_waits(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [wait for wait in self._waits if now - wait.since > self._seconds]
        if late:
            wait = late[-1]  # the innermost says most exactly what does not happen
            silent = [f"; {line}" for line in self._silent(3 * self._beat)]
            remedy = "; raise train.deadline_seconds if it may take that long"
            self._expire(
                f"waited {now - wait.since:.0f} s for {wait.whom}: {wait.what}{''.join(silent) or remedy}"
            )

    def _look_at_peers(self, silence: float) -> None:
        lost = self._silent(silence)
        if lost:
            self._expire("; ".join(lost))

    def _silent(self, seconds: float) -> list[str]:
        """What to say of each rank that failed, or gave no sign of life for ``seconds``."""
        now, found = time.monotonic(), []
        with self._lock:
            for rank, peer in sorted(self._peers.items()):
                age = now - peer.since
                if (
                    peer.state == _GONE and age > 2 * self._beat
                ):  # until then this rank may find out the same by itself
                    found.append(f"rank {rank} failed: {peer.doing}")
                elif peer.state == "alive" and age > seconds:
                    found.append(
                        f"rank {rank} gave no sign of life for {age:.1f} s; its last was: {peer.doing}"
                    )
        return found

    def _exchange(self, words: str) -> None:
        """Say something and hear the others.

        Where the board is out of reach, waits still have their deadlines.
        """
        with self._lock:
            if self._board is None:
                return
            self._count += 1
            try:
                self._board.say(f"{self._count} {words}")
                heard = self._board.read()
            except (OSError, RuntimeError) as error:
                self._board = None
                sys.stderr.write(
                    f"watchdog: {self._who} cannot reach the other ranks' board: "
                    f"{str(error).splitlines()[0]}\n"
                )
                return
            now = time.monotonic()
            self._peers |= {
                rank: _Peer(text, now) for rank, text in heard.items() if self._peers[rank].words != text
            }

    def _doing(self) -> str:
        with self._lock:
            return f"waiting for {self._waits[-1].whom}: {self._waits[-1].what}" if self._waits else "at work"

    # ends ---------------------------------------------------------------------------------------------------

    def _blame(self, error: RuntimeError) -> None:
        """Ends the process if ``error`` is a collective's that nobody joined in time, or of a peer
        that died; that takes time to see.
        """
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if "timed out" in reason.lower():
            with self._lock:
                seen = [f"; rank {rank} was {peer.doing}" for rank, peer in sorted(self._peers.items())]
            traceback.print_exception(error)
            self._expire(reason + "".join(seen))
        until = time.monotonic() + 6 * self._beat
        while self._board is not None and time.monotonic() < until:
            time.sleep(self._beat)
            lost = self._silent(3 * self._beat)
            if lost:
                traceback.print_exception(error)
                self._expire(f"{'; '.join(lost)}; here {reason}")

    def _expire(self, reason: str) -> None:
        """Say why, show what every thread is doing, and end this process and those it started."""
        sys.stderr.write(f"deadline: {self._who}: {reason}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)
        with self._lock:
            if self._board is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    self._board.say(f"{self._count + 1} {_GONE} {reason}")
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        for act in self._last_acts:
            with contextlib.suppress(OSError):
                act()
        os._exit(EXPIRED)
