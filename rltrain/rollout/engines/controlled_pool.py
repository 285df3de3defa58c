"""The learner's side of a pool of workers whose other side, requests and answers, is in the controller.

Rank 0 asks the controller which workers a push goes to, sends the weights itself, and says what became of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rltrain.rollout.controller import Controller, ControllerGone
from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.engines.remote_weights import RemoteWeights
from rltrain.rollout.engines.vllm_pool import PoolPusher, Pushed, Stream, ask_workers
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import PolicyVersion

__all__ = ["ControlledPool", "WorkerAddress"]

WorkerAddress = tuple[str, str, int]  # url, token, and how often the worker has been attached


class ControlledPool(RemoteWeights):
    """Implements ``WeightTarget``. controller: on rank 0; None elsewhere. connect: a client of a worker.

    A controller that has ended has no workers; the next ``take`` says so.
    """

    def __init__(
        self,
        controller: Controller | None,
        connect: Callable[[str, str], Any],
        shapes: WeightShapes,
        pusher: PoolPusher,
        dtype: torch.dtype,
        *,
        gather: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        super().__init__(dtype)
        self._controller = controller
        self._connect = connect
        self._shapes = shapes
        self._pusher = pusher
        self._gather = gather
        self._stream: Stream | None = None
        self._clients: dict[str, tuple[WorkerAddress, Any]] = {}

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``VllmPool.load``."""
        self._forget_version()
        self._stream = Stream(stream, self._shapes.check)
        self._push(version, waiting_only=False)
        self._note_version(version)

    def admit(self, policy: PolicyVersion) -> None:
        """Pushes to workers that wait for weights, while the others sample. A collective."""
        self._push(policy, waiting_only=True)

    def _push(self, version: PolicyVersion, *, waiting_only: bool) -> None:
        assert self._stream is not None
        workers = self._find_clients("begin_push", waiting_only)
        pushed: Pushed = self._pusher.push(workers, self._stream, version)
        self._tell("end_push", version, *pushed)

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``VllmPool.fingerprint``."""
        held: list[Mapping[str, Fingerprint]] = []
        if self._controller is not None:
            read, lost = self._pusher.read(self._find_clients("serving"))
            self._tell("lose", lost)
            held = [{name: value for name, value in read.items() if names is None or name in names}]
        return self._gather(held)[0]

    def _find_clients(self, call: str, *arguments: Any) -> dict[str, Any]:
        """The clients, by name, of the workers that the controller names."""
        if self._controller is None or self._controller.is_gone:
            return {}
        try:
            addresses: Mapping[str, WorkerAddress] = self._controller.call(call, *arguments)
        except ControllerGone:
            return {}
        for name, address in addresses.items():
            held = self._clients.get(name)
            if held is None or held[0] != address:
                if held is not None:
                    held[1].close()
                url, token, _ = address
                self._clients[name] = (address, self._connect(url, token))
        return {name: self._clients[name][1] for name in addresses}

    def _tell(self, call: str, *arguments: Any) -> None:
        if self._controller is None or self._controller.is_gone:
            return
        try:
            self._controller.call(call, *arguments)
        except ControllerGone:
            return

    def describe_workers(self) -> dict[str, Any]:
        """On rank 0: by name, what each worker that serves says it runs with, or the error it raised."""
        return ask_workers(self._find_clients("serving"))

    @property
    def push_cost(self) -> Any:
        """``sync.pool.PushCost`` of the last push; None: there was none."""
        return self._pusher.cost

    def close(self) -> None:
        """Closes the connections; ``ControlledRollouts.close`` ends controller and workers."""
        self.sleep()
        self._stream = None
        self._pusher.close()
        for _, client in self._clients.values():
            client.close()
        self._clients.clear()
