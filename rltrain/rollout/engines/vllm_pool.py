"""Many vLLM servers as one engine: the learner's rank 0 asks them for completions and sends them weights.

Other ranks hand their requests to rank 0 and get their answers from it; all they do themselves is to join the
gathers. A worker that comes back, or joins, in the middle of a step is sent the weights then: that is a
collective of the ranks, hence it happens in the thread that samples, between two answers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rltrain.adapter_files import NamedAdapter
from rltrain.protocols import EngineState
from rltrain.rollout.engines.checks import require_fit, require_version
from rltrain.rollout.engines.free_running import FreeGroups
from rltrain.rollout.engines.remote_weights import RemoteWeights
from rltrain.rollout.packed import pack_groups, pack_requests, unpack_requests, unpack_sampled
from rltrain.rollout.pool.pool import ADMIT, NOWHERE, Batch, Counts, WorkerPool
from rltrain.rollout.worker.flags import MODEL_NAME
from rltrain.rollout.worker.requests import AdapterNames, ServerModel, make_request, require_supported
from rltrain.rollout.worker.threads import LoopThread
from rltrain.tensor_ops import Fingerprint
from rltrain.timeline import Timeline
from rltrain.types.samples import Answer, PolicyVersion, Request, RolloutGroup

__all__ = [
    "AdapterPoolPusher",
    "PoolPusher",
    "PoolSampler",
    "Pushed",
    "Stream",
    "VllmPool",
    "ask_workers",
]


_Told = TypeVar("_Told")
_Ask = Callable[[Mapping[str, Any]], tuple[_Told, Mapping[str, Exception]]]
# What became of a push, by the names of the workers: those that were proved and sample again, those that were
# lost, and those that are quarantined, each with the reason.
Pushed = tuple[tuple[str, ...], Mapping[str, Exception], Mapping[str, Exception]]


class PoolPusher(Protocol):
    """Sends weights to workers and proves that they arrived. Every rank calls; only rank 0 names workers."""

    def push(
        self, workers: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: PolicyVersion
    ) -> Pushed:
        """A collective. workers: clients by name. weights: iterated over once for each attempt, and at least
        once.
        """
        ...

    def read(self, workers: Mapping[str, Any]) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]:
        """On rank 0: the fingerprints that these workers have now, NaN where they differ, and those that do
        not answer. Without workers, those of the weights that were sent last.
        """
        ...

    cost: Any  # ``sync.pool.PushCost`` of the last push; None: there was none

    def close(self) -> None: ...


class AdapterPoolPusher(Protocol):
    """Sends adapters to workers that hold the base, and proves that they arrived; on rank 0."""

    def push_adapter(self, workers: Mapping[str, Any], adapter: NamedAdapter) -> Pushed: ...

    def read(self, workers: Mapping[str, Any]) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]:
        """See ``PoolPusher.read``, of the base."""
        ...

    def read_adapter(
        self, workers: Mapping[str, Any]
    ) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]: ...

    def score(
        self, workers: Mapping[str, Any], token_ids: Sequence[int], model: str
    ) -> tuple[list[list[float]], Mapping[str, Exception]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stream:
    """Weights that can be iterated over again as long as the learner keeps them, each time checked."""

    weights: Iterable[tuple[str, Tensor]]
    check: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.check(self.weights)


class PoolSampler:
    """Implements ``Sampler`` where the weights are sent from elsewhere. admit: returns when the workers that
    wait for weights have been sent them.
    """

    name = "vllm_server"

    def __init__(
        self, pool: WorkerPool, loop: LoopThread, model: ServerModel, admit: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._loop = loop
        self._model = model
        self._admit = admit

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``VllmPool.sample``. A worker that does not hold ``policy`` is asked for nothing."""
        require_sampleable(requests, self._model)
        collector = _Collector(self._pool, self._loop, self._model, requests, policy, None)
        return _collect_all(collector, self._admit)

    def close(self) -> None: ...


class VllmPool(RemoteWeights):
    """Implements ``RolloutEngine`` and, on workers that take adapters, ``AdapterTarget``.

    pool: on rank 0, in ``loop``; None elsewhere. adapters: takes the place of ``pusher`` in a run that trains
    an adapter. gather: concatenates the lists of all ranks, in the order of the ranks; a collective. rank: of
    this process. at_close: called before the workers are ended.
    """

    def __init__(
        self,
        pool: WorkerPool | None,
        loop: LoopThread | None,
        model: ServerModel,
        pusher: PoolPusher,
        dtype: torch.dtype,
        *,
        adapters: AdapterPoolPusher | None = None,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[list[Any]], list[Any]] = list,
        at_close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(dtype)
        self._pool = pool
        self.loop = loop
        self._model = model
        self._pusher = pusher
        self._adapters = adapters
        self._adapter: NamedAdapter | None = None  # that workers have, or get when they come
        self._names = AdapterNames()
        self._policy_model: str | None = None  # its name, with adapters; None: what was pushed last
        self._rank = rank
        self._world_size = world_size
        self._gather = gather
        self._at_close = at_close
        self._stream: Stream | None = None
        self._pushing = threading.Lock()  # the learner's thread pushes, and whichever samples

    @property
    def counts(self) -> Counts:
        """On rank 0: of the requests so far."""
        assert self._pool is not None
        return self._pool.counts

    # weights ------------------------------------------------------------------------------------------------

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``WeightTarget.load``. Every rank gathers the weights; rank 0 sends them to all workers.

        Workers that do not take them are lost or quarantined. Where none is left, sampling waits for one.
        """
        self._forget_version()
        self._stream = Stream(stream, self._model.shapes.check)
        self._push(version, waiting_only=False)
        self._note_version(version)

    def load_adapter(
        self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: PolicyVersion
    ) -> None:
        """See ``AdapterTarget.load_adapter``. Rank 0 uploads it to all workers, under a new name.

        What becomes of a worker that does not take it, see ``load``.
        """
        self._forget_version()
        self._adapter = NamedAdapter(self._names.next(version), dict(config), dict(weights))
        self._policy_model = self._adapter.name
        self._push(version, waiting_only=False)
        self._note_version(version)

    def use_base(self, version: PolicyVersion) -> None:
        """See ``AdapterTarget.use_base``; the workers keep the adapter, and no request names it."""
        self._forget_version()
        self._policy_model = MODEL_NAME
        self._push(version, waiting_only=False)
        self._note_version(version)

    def _push(self, version: PolicyVersion, *, waiting_only: bool) -> None:
        with self._pushing:
            self._push_alone(version, waiting_only=waiting_only)

    def _push_alone(self, version: PolicyVersion, *, waiting_only: bool) -> None:
        workers: dict[str, Any] = {}
        if self._pool is not None and self.loop is not None:
            begin = self._pool.begin_push(waiting_only=waiting_only, version=version)
            workers = self.loop.run(begin).result()
        if self._adapter is not None and self._adapters is not None:
            pushed = self._adapters.push_adapter(workers, self._adapter)
        else:
            assert self._stream is not None
            pushed = self._pusher.push(workers, self._stream, version)
        if self._pool is not None and self.loop is not None:
            end = self._pool.end_push(version, *pushed)
            self.loop.run(end).result()

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``, over all workers that serve; with adapters, of the base.

        A worker that has gone since it was proved has nothing that could be compared.
        """
        pusher = self._adapters or self._pusher
        held = self._ask_serving(pusher.read)
        subsets = [
            {name: value for name, value in each.items() if names is None or name in names} for each in held
        ]
        return self._gather(subsets)[0]

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]:
        """See ``AdapterTarget.adapter_fingerprint``; nothing while the base is in use."""
        if self._policy_model == MODEL_NAME:
            return {}
        assert self._adapters is not None
        return self._gather(self._ask_serving(self._adapters.read_adapter))[0]

    def prompt_log_probs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """See ``AdapterTarget.prompt_log_probs``, over all workers that serve."""
        assert self._adapters is not None and self._policy_model is not None
        score = partial(self._adapters.score, token_ids=token_ids, model=self._policy_model)
        return self._gather([row for rows in self._ask_serving(score) for row in rows])

    def _ask_serving(self, ask: _Ask[_Told]) -> list[_Told]:
        """On rank 0, what the workers that serve say; those that do not answer are lost."""
        if self._pool is None or self.loop is None:
            return []
        told, lost = ask(self.loop.run(self._pool.serving()).result())
        self.loop.run(self._pool.lose(lost)).result()
        return [told]

    def describe_workers(self) -> dict[str, Any]:
        """On rank 0: by name, what each worker that serves says it runs with, or the error it raised."""
        if self._pool is None or self.loop is None:
            return {}
        return ask_workers(self.loop.run(self._pool.serving()).result())

    @property
    def push_cost(self) -> Any:
        """``sync.pool.PushCost`` of the last push; None: there was none."""
        return self._pusher.cost

    def close(self) -> None:
        """Ends the workers that rltrain started; any other goes on."""
        self.sleep()
        self._stream = None
        self._at_close()
        if self._adapters is not None:
            self._adapters.close()
        if self._pool is None or self.loop is None:
            return
        self.loop.run(self._pool.close()).result()
        self.loop.close()
        self.loop = None
        self._pool = None
        self._pusher.close()

    # samples ------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``. With one rank, answers come as the workers finish them.

        Raises WorkersGone where no worker is left and none comes back in time.
        """
        require_version(self, policy)
        require_sampleable(requests, self._model)
        self.state = EngineState.SERVING
        if self._world_size == 1:
            return _collect_all(self._submit(requests, policy), lambda: self._push(policy, waiting_only=True))
        return self._sample_together(list(requests), policy)

    def run_freely(self, timeline: Timeline = NOWHERE) -> FreeGroups:
        """Groups that are sampled by whatever weights the workers hold, also while the learner pushes others.

        timeline: gets when workers sample. One rank, without adapters.
        """
        assert self._pool is not None and self.loop is not None
        self.loop.run(self._pool.use_timeline(timeline)).result()
        return FreeGroups(self._pool, self.loop, self._model, self._admit_waiting)

    def note_workers(self) -> dict[str, float]:
        """On rank 0, numbers of the pool since the last call, as metrics."""
        assert self._pool is not None and self.loop is not None
        return self.loop.run(self._pool.notes()).result()

    def _admit_waiting(self) -> None:
        """Sends the weights that were pushed last to workers that wait for them, if there are any."""
        assert self._pool is not None and self.loop is not None
        with self._pushing:
            if self.version is not None and self.loop.run(self._pool.waits_for_weights()).result():
                self._push_alone(self.version, waiting_only=True)

    def _sample_together(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """All ranks' requests, sampled by rank 0's pool. Ranks agree on every push, which is a collective."""
        shares = [unpack_requests(share) for share in self._gather([pack_requests(requests)])]
        everything = [(rank, place) for rank, share in enumerate(shares) for place in range(len(share))]
        collector = None
        if self._pool is not None:
            collector = self._submit([shares[rank][place] for rank, place in everything], policy)
        answers: list[Answer] = []
        while True:
            event = [] if collector is None else [_collect(collector, answers)]
            news = self._gather(event)[0]
            if isinstance(news, BaseException):
                raise news
            if news == ADMIT:
                self._push(policy, waiting_only=True)
                continue
            break
        answered: list[list[RolloutGroup]] = [[] for _ in shares]
        for answer in answers:
            rank, place = everything[answer.request]
            answered[rank].append(RolloutGroup(place, answer.prompt, answer.completions))
        known = [{request.prompt.id: request.prompt for request in share} for share in shares]
        is_main = self._pool is not None
        packed = [pack_groups(*pair) for pair in zip(answered, known, strict=True)] if is_main else []
        for group in unpack_sampled(self._gather(packed)[self._rank], known[self._rank]):
            yield Answer(group.group, requests[group.group].prompt, group.completions)

    def _submit(self, requests: Sequence[Request], policy: PolicyVersion) -> _Collector:
        assert self._pool is not None and self.loop is not None
        return _Collector(self._pool, self.loop, self._model, requests, policy, self._policy_model)


class _Collector:
    """A batch's answers, in the thread that samples."""

    def __init__(
        self,
        pool: WorkerPool,
        loop: LoopThread,
        model: ServerModel,
        requests: Sequence[Request],
        policy: PolicyVersion,
        policy_model: str | None,
    ) -> None:
        self.missing = len(requests)
        self._pool = pool
        self._loop = loop
        self._model = model
        self._requests = requests
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        asked = [
            (request.prompt.id, make_request(request, policy, model.stop_token_ids, policy_model))
            for request in requests
        ]
        self._batch: Batch = loop.run(pool.submit(asked, policy, self._arrivals.put)).result()

    def next(self) -> Answer | None:
        """The next answer; None: a worker waits for weights. Raises the error that ended the batch."""
        arrival = self._arrivals.get()
        if isinstance(arrival, BaseException):
            raise arrival
        if arrival == ADMIT:
            return None
        place, choices = arrival
        self.missing -= 1
        request = self._requests[place]
        completions = tuple(self._model.make_completion(choice, request.sampling) for choice in choices)
        return Answer(place, request.prompt, completions * (request.count // len(completions)))

    def close(self) -> None:
        if not self._batch.is_ended:
            self._loop.run(self._pool.give_up(self._batch)).result()


def ask_workers(clients: Mapping[str, Any]) -> dict[str, Any]:
    """By name what each says that it runs with, or the error that it raised."""
    facts: dict[str, Any] = {}
    for name, client in clients.items():
        try:
            facts[name] = client.read_info()
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            facts[name] = error
    return facts


def require_sampleable(requests: Sequence[Request], model: ServerModel) -> None:
    """Raises ValueError for what no worker can sample."""
    limit = model.max_model_len
    require_fit(requests, limit, "the server's max_model_len or the model's max_position_embeddings")
    for request in requests:
        require_supported(request.sampling)


def _collect_all(collector: _Collector, admit: Callable[[], None]) -> Iterator[Answer]:
    """Answers as they come."""
    try:
        while collector.missing:
            answer = collector.next()
            if answer is None:
                admit()
            else:
                yield answer
    finally:
        collector.close()


def _collect(collector: _Collector, answers: list[Answer]) -> str | BaseException:
    """Collects until all answers are there, a worker waits for weights (ADMIT), or an error ends it all."""
    try:
        while collector.missing:
            answer = collector.next()
            if answer is None:
                return ADMIT
            answers.append(answer)
    except (RuntimeError, ValueError, OSError) as error:
        return error
    return ""
