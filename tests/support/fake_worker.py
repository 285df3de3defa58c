"""A worker that holds weights and samples nothing: a process of its own behind the real transport, with
faults to order.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from rltrain.tensor_ops import weight_fingerprint
from rltrain.weight_transfer import Bucket, Membership, ProcessSums, TransferGroup, connect_store

# phase -> the calls at which a fault strikes
PHASES = ("pause", "join", "start", "bucket", "finish", "proof", "resume")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "rltrain.weight_transfer", "rltrain.tensor_ops"])


class FakeWorker:
    """Implements ``WorkerControl``.

    fault: "error" (the call is refused), "die", "stop" (SIGSTOP) or "slow"; it strikes at ``phase``, at the
    second bucket for "bucket", ``times`` times. calls: names of all calls, in their order.
    """

    def __init__(self, ties: Mapping[str, str] = {}) -> None:
        self.calls: list[str] = []
        self.fault: str | None = None
        self.phase = ""
        self.times = 0
        self._lock = threading.Lock()
        self._pipe, end = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(end, dict(ties)), daemon=True)
        self.process.start()
        end.close()
        self._ask("wait")

    def order(self, fault: str, phase: str, times: int = 1) -> None:
        self.fault = fault
        self.phase = phase
        self.times = times

    def pause(self, mode: Literal["keep", "wait", "abort"], clear_cache: bool) -> None:
        assert clear_cache
        self._call("pause", "wait")

    def init_transfer(self, init_info: Mapping[str, object]) -> None:
        self._call("join", "join", dict(init_info))

    def start_update(self) -> None:
        self._call("start", "start")

    def update(self, update_info: Mapping[str, object]) -> None:
        second = "bucket" if update_info["index"] == 1 else ""
        self._call(second, "update", dict(update_info), log="update")

    def finish_update(self, version: str) -> None:
        self._call("finish", "finish", version)

    def call_workers(self, method: str, arguments: Mapping[str, str]) -> list[object]:
        phase = "proof" if method == "rltrain_fingerprint" else ""
        return [self._call(phase, method, *arguments.values(), log=method)]

    def world_size(self) -> int:
        return 1

    def resume(self) -> None:
        self._call("resume", "wait")

    def weights(self) -> dict[str, Tensor]:
        return {name: torch.tensor(rows) for name, rows in self._ask("weights").items()}

    def damage(self, name: str) -> None:
        """From now on, one entry of this weight stays as it is."""
        self._ask("damage", name)

    def refuse(self, reason: str) -> None:
        """From now on, its weights cannot be read back."""
        self._ask("refuse", reason)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def _call(self, phase: str, method: str, *arguments: Any, log: str = "") -> Any:
        self.calls.append(log or phase)
        if phase and phase == self.phase and self.times > 0:
            self.times -= 1
            self._strike()
        return self._ask(method, *arguments)

    def _strike(self) -> None:
        pid = self.process.pid or 0
        if self.fault == "error":
            raise RuntimeError("refused by order")
        if self.fault == "slow":
            time.sleep(0.3)
        if self.fault == "die":
            os.kill(pid, signal.SIGKILL)
        if self.fault == "stop":
            os.kill(pid, signal.SIGSTOP)

    def _ask(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            try:
                self._pipe.send((method, arguments))
                is_error, answer = self._pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise RuntimeError("the worker is gone") from error
        if is_error:
            raise RuntimeError(answer)
        return answer


class State:
    def __init__(self, ties: dict[str, str]) -> None:
        self.ties = ties
        self.weights: dict[str, Tensor] = {}
        self.arriving: dict[str, Tensor] | None = None
        self.damaged: str | None = None
        self.refusal = ""
        self.group: TransferGroup | None = None

    def wait(self) -> None: ...

    def join(self, info: dict[str, Any]) -> None:
        membership = Membership(**info)
        self.group = TransferGroup(connect_store(membership), membership, membership.rank_offset)

    def start(self) -> None:
        if self.arriving is not None:
            raise RuntimeError("an update is already active")
        self.arriving = {}

    def update(self, info: dict[str, Any]) -> None:
        bucket = Bucket(**info)
        assert self.group is not None and self.arriving is not None
        buffer = torch.empty(bucket.total_bytes, dtype=torch.uint8)
        if bucket.names:
            self.group.wait(self.group.broadcast(buffer, bucket.seconds), bucket.seconds)
        self.arriving.update((name, tensor.clone()) for name, tensor in bucket.views(buffer))

    def finish(self, version: str) -> None:
        assert self.arriving is not None
        arriving = self.arriving
        if self.damaged is not None and self.damaged in self.weights:
            arriving[self.damaged] = self.weights[self.damaged]
        self.weights = arriving
        self.arriving = None

    def rltrain_alive(self) -> str:
        return "alive"

    def rltrain_abandon(self) -> None:
        self.arriving = None

    def rltrain_fingerprint(self, key: str, names: str = "") -> None:
        assert self.group is not None
        weights = self.weights | {second: self.weights[first] for second, first in self.ties.items()}
        subset = json.loads(names) if names else weights
        sums = {name: (*weight_fingerprint(name, weights[name]), 0) for name in subset}
        self.group.store.set(f"{key}/1", ProcessSums(sums, refusal=self.refusal).to_json())

    def damage(self, name: str) -> None:
        self.damaged = name

    def refuse(self, reason: str) -> None:
        self.refusal = reason

    def read_weights(self) -> dict[str, Any]:
        return {name: weight.float().tolist() for name, weight in self.weights.items()}


def _serve(pipe: Connection, ties: dict[str, str]) -> None:
    torch.set_num_threads(1)
    state = State(ties)
    while True:
        method, arguments = pipe.recv()
        try:
            call = state.read_weights if method == "weights" else getattr(state, method)
            pipe.send((False, call(*arguments)))
        except (RuntimeError, TimeoutError, AssertionError, OSError) as error:
            pipe.send((True, f"{type(error).__name__}: {error}"))
