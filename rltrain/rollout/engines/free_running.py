"""Groups that workers sample without a break, each token by the weights that its worker holds then."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from rltrain.rollout.engines.checks import require_fit
from rltrain.rollout.pool.pool import ADMIT, Batch, WorkerPool
from rltrain.rollout.worker.requests import ServerModel, make_request, require_supported
from rltrain.rollout.worker.threads import LoopThread
from rltrain.types.samples import PolicyVersion, Request, RolloutGroup

__all__ = ["FreeGroups"]


class FreeGroups:
    """admit: sends the present weights to workers that wait for them. One thread calls ``next``."""

    def __init__(
        self, pool: WorkerPool, loop: LoopThread, model: ServerModel, admit: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._loop = loop
        self._model = model
        self._admit = admit
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._batches: dict[int, Batch] = {}
        self._lock = threading.Lock()  # of ``_batches``: an answer may come before ``begin`` returns

    def begin(self, number: int, request: Request, policy: PolicyVersion) -> None:
        """Asks for a group; ``number`` is its name. policy: the present one, or an older one.

        Raises ValueError for what no worker can sample.
        """
        require_fit([request], self._model.max_model_len, "the server's max_model_len")
        require_supported(request.sampling)
        asked = make_request(request, policy, self._model.stop_token_ids)

        def put(arrival: Any) -> None:
            self._arrivals.put((number, request, arrival))

        with self._lock:
            work = self._pool.submit([(request.prompt.id, asked)], None, put)
            self._batches[number] = self._loop.run(work).result()

    def give_up(self, number: int) -> None:
        """Nothing is sampled for this group any more; one that is not under way is no error."""
        with self._lock:
            batch = self._batches.pop(number, None)
        if batch is not None:
            self._loop.run(self._pool.give_up(batch)).result()

    def find_start(self, number: int) -> PolicyVersion | None:
        """The version that drew the group's first token, at the earliest; None: none has been drawn."""
        batch = self._batches.get(number)
        return None if batch is None else batch.started

    def next(self) -> tuple[int, RolloutGroup] | None:
        """The next group that is whole, under its number; None: ``close`` was called.

        Raises the error that ended the workers.
        """
        while True:
            number, request, arrival = self._arrivals.get()
            if request is None:
                return None
            if isinstance(arrival, BaseException):
                raise arrival
            if arrival == ADMIT:
                self._admit()
                continue
            with self._lock:
                is_wanted = self._batches.pop(number, None) is not None
            if is_wanted:
                return number, self._make_group(number, request, arrival[1])

    def _make_group(self, number: int, request: Request, choices: list[Any]) -> RolloutGroup:
        completions = tuple(self._model.make_completion(choice, request.sampling) for choice in choices)
        return RolloutGroup(number, request.prompt, completions * (request.count // len(completions)))

    def close(self) -> None:
        """Gives up everything; ``next`` returns None."""
        for number in list(self._batches):
            self.give_up(number)
        self._arrivals.put((0, None, None))
