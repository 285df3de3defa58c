"""Where workers come from: processes that rltrain starts on this machine, or addresses. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from rltrain.rollout.worker.client import ServerInfo, WorkerClient
from rltrain.rollout.worker.flags import WorkerSettings
from rltrain.rollout.worker.process import LocalWorker, WorkerDied

__all__ = ["Connector", "LocalHome", "RemoteHome"]

_GATE_SECONDS = 0.2


@dataclass(frozen=True)
class Connector:
    """connect(url, token) makes a client; require(info, url) raises UserError where a server does not sample
    as the recipe asks.
    """

    connect: Callable[[str, str], WorkerClient]
    require: Callable[[ServerInfo, str], None]

    def attach(self, url: str, token: str) -> tuple[WorkerClient, int]:
        """A client of a worker that answers, works and fits the recipe, and the rows it samples at once."""
        client = self.connect(url, token)
        try:
            info = client.read_info()
            self.require(info, url)
            client.require_alive()
        except BaseException:
            client.close()
            raise
        return client, info.max_num_seqs * info.data_parallel


@dataclass
class RemoteHome:
    """A worker that somebody else started."""

    url: str
    token: str = field(repr=False)
    connector: Connector
    is_local: bool = False

    def open(self) -> tuple[WorkerClient, int]:
        """See ``Home.open``."""
        return self.connector.attach(self.url, self.token)

    def require_process(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class LocalHome:
    """A worker that rltrain starts here, and starts again when it has died or hangs.

    silence_seconds: see ``LocalWorker.wait_until_serving``. gate: held during a start, where several at once
    would only slow each other down; None: they start together.
    """

    settings: WorkerSettings
    connector: Connector
    silence_seconds: float
    gate: threading.Lock | None = None
    start: Callable[[WorkerSettings], LocalWorker] = LocalWorker
    is_local: bool = True
    worker: LocalWorker | None = None
    _is_closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> tuple[WorkerClient, int]:
        """See ``Home.open``."""
        self._enter_gate()
        try:
            with self._lock:
                self._require_open()
                self._end(grace_seconds=0.0)
                worker = self.worker = self.start(self.settings)
            worker.wait_until_serving(self.silence_seconds, lambda: self._is_closed)
        finally:
            if self.gate is not None:
                self.gate.release()
        return self.connector.attach(worker.address.url, worker.token)

    def require_process(self) -> None:
        """See ``Home.require_process``."""
        if self.worker is not None:
            self.worker.require_alive()

    def close(self) -> None:
        """See ``Home.close``."""
        self._is_closed = True
        with self._lock:
            self._end()

    def _enter_gate(self) -> None:
        while self.gate is not None and not self.gate.acquire(timeout=_GATE_SECONDS):
            self._require_open()

    def _require_open(self) -> None:
        if self._is_closed:
            raise WorkerDied("the pool is being closed")

    def _end(self, **options: float) -> None:
        if self.worker is not None:
            self.worker.close(**options)
            self.worker = None
