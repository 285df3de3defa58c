"""The program's end of a killable process (``processes.py``): its socket to the trainer, and its limits.

The program is executed, not forked, so nothing of the trainer (torch, CUDA, threads) is in it. It leads its
own process group, which dies with it. The trainer sends pickles, since requests may hold anything; the
program answers in JSON (``reply.py``), since the code that it runs could write to the socket too.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
from typing import Any

from rltrain.reward.reply import LENGTH

__all__ = ["Channel", "bound_cpu_time", "bound_memory"]


class Channel:
    """The socket's end ``descriptor``. From now on SIGTERM does not end this process, and a hangup of the
    trainer ends its whole group."""

    def __init__(self, descriptor: int) -> None:
        # A signal that stops a job goes to all its processes, but the trainer finishes its step first, and
        # needs this process for it. Unlike an ignored signal, a handler is not inherited by what is executed.
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._socket = socket.socket(fileno=descriptor)
        self._stream = self._socket.makefile("rb")
        self._process = os.getpid()
        threading.Thread(target=_die_with_trainer, args=(descriptor,), daemon=True).start()

    def receive(self) -> Any:
        """The next message. Ends the process where the trainer has closed the socket."""
        head = self._stream.read(LENGTH.size)
        if len(head) < LENGTH.size:
            sys.exit(0)
        return pickle.loads(self._stream.read(LENGTH.unpack(head)[0]))

    def send(self, frame: bytes) -> None:
        self._socket.sendall(frame)

    def exit_if_forked(self) -> None:
        """Ends a child that user code has forked and let return to the program: one process answers."""
        if os.getpid() != self._process:
            os._exit(0)


def bound_memory(memory_bytes: int) -> None:
    """The address space that this process may use."""
    _limit(resource.RLIMIT_AS, memory_bytes)


def bound_cpu_time(seconds: float) -> None:
    """A last resort against a loop inside one C call after the trainer's death: far beyond what the pool
    allows."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = usage.ru_utime + usage.ru_stime + 60 + 2 * seconds * (os.cpu_count() or 1)
    _limit(resource.RLIMIT_CPU, int(allowed))


def _limit(kind: int, value: int) -> None:
    """This process's soft limit, within the hard limit that it was started with."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _die_with_trainer(descriptor: int) -> None:
    """Waits until the trainer has closed the other end or was killed, and ends the whole process group."""
    hangup = select.poll()
    hangup.register(descriptor, 0)
    hangup.poll()
    os.killpg(0, signal.SIGKILL)
