"""A vLLM server in another process: the learner's ranks ask it for completions and rank 0 sends it weights.

The server has no memory in common with the learner, so that ``sleep`` only forgets the version: nothing
samples until the next load. Log-probs may differ from the colocated engine's in rounding, since some kernels
sum in another order where a batch has another number of rows.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rltrain.adapter_files import NamedAdapter
from rltrain.errors import UserError
from rltrain.model_files import padded_rank
from rltrain.protocols import EngineState
from rltrain.rollout.engines.checks import require_fit, require_version
from rltrain.rollout.engines.remote_weights import RemoteWeights
from rltrain.rollout.worker.answers import GarbageAnswer, GenerateRequest
from rltrain.rollout.worker.client import ServerInfo, WorkerBusy, WorkerClient, WorkerLost
from rltrain.rollout.worker.flags import KNOWN_VERSIONS, MODEL_NAME, WorkerSettings
from rltrain.rollout.worker.guard import Choice
from rltrain.rollout.worker.process import LocalWorker, WorkerDied
from rltrain.rollout.worker.requests import AdapterNames, ServerModel, make_request, require_supported
from rltrain.rollout.worker.threads import LoopThread
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import Answer, PolicyVersion, Request

__all__ = ["AdapterPusher", "VllmServer", "WeightPusher", "require_settings"]

_STRIKES = 3  # garbage answers to one request, after which the worker is not believed
_BUSY_SECONDS = 0.5  # between tries of a request that the worker does not serve now
_MISSES = 2  # calls in a row without a sign of life, after which the worker counts as lost


class WeightPusher(Protocol):
    """Sends weights to the server, and reads the fingerprints of those that it multiplies with."""

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None: ...

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]: ...

    def close(self) -> None: ...


class AdapterPusher(Protocol):
    """Sends adapters to the server, beside the base that it holds itself."""

    def load_adapter(self, adapter: NamedAdapter) -> None: ...

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """Of the base."""
        ...

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]: ...

    def score(self, token_ids: Sequence[int], model: str) -> list[float]: ...

    def close(self) -> None: ...


class VllmServer(RemoteWeights):
    """Implements ``RolloutEngine`` and, on a server that takes adapters, ``AdapterTarget``.

    client: of the server, which serves already. pusher, adapters: on rank 0 one of the two, None elsewhere.
    gather: concatenates the lists of all ranks, in the order of the ranks; a collective. worker: the server's
    process if rltrain started it; ``close`` ends it.
    """

    def __init__(
        self,
        client: WorkerClient,
        info: ServerInfo,
        model: ServerModel,
        pusher: WeightPusher | None,
        *,
        adapters: AdapterPusher | None = None,
        worker: LocalWorker | None = None,
        gather: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        super().__init__(getattr(torch, info.dtype))
        self._client = client
        self._rows = info.max_num_seqs
        self._model = model
        self._pusher = pusher
        self._adapters = adapters
        self._names = AdapterNames()
        self._policy_model: str | None = None  # its name, with adapters; None: what was pushed last
        self._worker = worker
        self._gather = gather
        self._loop = LoopThread()
        self._session = secrets.token_hex(4)  # no other rank, nor a learner before, repeats a request's id
        self._sent = 0  # requests, for their ids

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``WeightTarget.load``. Every rank gathers the weights; rank 0 sends them."""
        self._forget_version()
        weights = self._model.shapes.check(stream)
        if self._pusher is None:
            for _ in weights:
                pass
        else:
            self._pusher.load(weights, version)
        self._gather([])  # no rank samples before the server has the version
        self._note_version(version)

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``; with adapters, of the base."""
        pusher = self._pusher or self._adapters
        held = [] if pusher is None else [pusher.fingerprint(names)]
        return self._gather(held)[0]

    def load_adapter(
        self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: PolicyVersion
    ) -> None:
        """See ``AdapterTarget.load_adapter``. Rank 0 uploads it, under a new name."""
        self._forget_version()
        sent: list[str] = []
        if self._adapters is not None:
            adapter = NamedAdapter(self._names.next(version), dict(config), dict(weights))
            self._adapters.load_adapter(adapter)
            sent.append(adapter.name)
        self._policy_model = self._gather(sent)[0]
        self._note_version(version)

    def use_base(self, version: PolicyVersion) -> None:
        """See ``AdapterTarget.use_base``."""
        self._forget_version()
        self._policy_model = MODEL_NAME
        self._note_version(version)

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]:
        """See ``AdapterTarget.adapter_fingerprint``; nothing while the base is in use."""
        if self._policy_model == MODEL_NAME:
            return {}
        held = [] if self._adapters is None else [self._adapters.adapter_fingerprint()]
        return self._gather(held)[0]

    def prompt_log_probs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """See ``AdapterTarget.prompt_log_probs``."""
        assert self._policy_model is not None
        rows = [] if self._adapters is None else [self._adapters.score(token_ids, self._policy_model)]
        return self._gather(rows)

    def close(self) -> None:
        """Ends a server that rltrain started; any other goes on."""
        if self._loop is None:
            return
        self._loop.run(self._client.close_async()).result()
        self._loop.close()
        self._loop = None
        self.sleep()
        if pusher := self._pusher or self._adapters:
            pusher.close()
        self._client.close()
        if self._worker is not None:
            self._worker.close()

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``. Answers come as the server finishes them.

        Raises WorkerLost where the server does not answer any more, and GarbageAnswer where it answers one
        request wrongly several times.
        """
        require_version(self, policy)
        limit = self._model.max_model_len
        require_fit(requests, limit, "the server's max_model_len or the model's max_position_embeddings")
        for request in requests:
            require_supported(request.sampling)
        self.state = EngineState.SERVING
        assert self._loop is not None
        arrivals: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        work = self._loop.run(self._answer_all(requests, policy, arrivals.put))
        return _take_answers(arrivals, len(requests), work)

    async def _answer_all(
        self,
        requests: Sequence[Request],
        policy: PolicyVersion,
        put: Callable[[Answer | BaseException], None],
    ) -> None:
        """Puts an answer for every request, or one error."""
        slots = asyncio.Semaphore(2 * self._rows)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                tasks = [
                    group.create_task(self._answer(index, request, policy, slots, put))
                    for index, request in enumerate(requests)
                ]
                if tasks:
                    await asyncio.wait(tasks)
                watch.cancel()
        except* (RuntimeError, UserError, OSError) as errors:
            put(_first_error(errors))

    async def _answer(
        self,
        index: int,
        request: Request,
        policy: PolicyVersion,
        slots: asyncio.Semaphore,
        put: Callable[[Answer | BaseException], None],
    ) -> None:
        """Asks for a request's samples, no more than the server takes at once, and puts the answer."""
        count = self._make_request(request, policy).n
        parts = [(first, min(self._rows, count - first)) for first in range(0, count, self._rows)]
        chosen = await asyncio.gather(*(self._ask(request, first, n, policy, slots) for first, n in parts))
        completions = tuple(
            self._model.make_completion(choice, request.sampling) for choices in chosen for choice in choices
        )
        completions *= request.count // len(completions)
        put(Answer(index, request.prompt, completions))

    def _make_request(self, request: Request, policy: PolicyVersion) -> GenerateRequest:
        return make_request(request, policy, self._model.stop_token_ids, self._policy_model)

    async def _ask(
        self, request: Request, first: int, n: int, policy: PolicyVersion, slots: asyncio.Semaphore
    ) -> list[Choice]:
        """``n`` samples from ``first`` on; after a garbage answer they are asked for again. Raises
        GarbageAnswer.
        """
        asked = self._make_request(request, policy)
        asked = replace(asked, n=n, seed=asked.seed + first)
        strikes = 0
        while True:
            self._sent += 1
            try:
                async with slots:
                    return await self._generate(
                        replace(asked, id=f"rltrain-{self._session}-{self._sent}"), policy
                    )
            except WorkerBusy:
                await asyncio.sleep(_BUSY_SECONDS)
            except GarbageAnswer as error:
                strikes += 1
                if strikes == _STRIKES:
                    raise GarbageAnswer(
                        f"prompt {request.prompt.id!r}: the worker's answer was refused {strikes} times, "
                        f"last because {error}; restart it, with a vLLM that rltrain tests"
                    ) from error
                warnings.warn(f"prompt {request.prompt.id!r} is sampled again: {error}", stacklevel=2)

    async def _generate(self, asked: GenerateRequest, policy: PolicyVersion) -> list[Choice]:
        choices = await self._client.generate(asked, vocabulary=self._model.vocabulary, labels={str(policy)})
        if any(choice.finish == "abort" for choice in choices):
            raise GarbageAnswer("the server aborted it")
        return choices

    async def _watch(self) -> None:
        """Raises WorkerLost when the server's process has ended, or does not work: a stopped one still
        answers ``/health``.
        """
        misses = 0
        while True:
            await asyncio.sleep(self._client.seconds.alive)
            try:
                if self._worker is not None:
                    self._worker.require_alive()
            except WorkerDied as error:
                raise WorkerLost(str(error)) from error
            try:
                await asyncio.to_thread(self._client.require_alive)
                misses = 0
            except WorkerLost as error:
                misses += 1
                if misses == _MISSES:
                    raise WorkerLost(
                        f"{error}; and so {misses} times in a row: it has died or hangs"
                    ) from error


def _take_answers(
    arrivals: queue.SimpleQueue[Answer | BaseException], count: int, work: Future[None]
) -> Iterator[Answer]:
    """Ends the requests that are left where the caller stops early."""
    try:
        for _ in range(count):
            arrival = arrivals.get()
            if isinstance(arrival, BaseException):
                raise arrival
            yield arrival
    finally:
        work.cancel()


def _first_error(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The error that ended a group, without the groups around it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def require_settings(info: ServerInfo, settings: WorkerSettings, url: str) -> None:
    """Raises UserError where a server that somebody started samples otherwise than the recipe asks."""
    problems: list[str] = []
    if not info.version.startswith(tuple(f"{version}." for version in KNOWN_VERSIONS)):
        problems.append(f"its vLLM is {info.version}; rltrain knows {', '.join(KNOWN_VERSIONS)}")
    if info.dtype != settings.dtype:
        problems.append(f"its dtype is {info.dtype}, the recipe's {settings.dtype}")
    if info.max_model_len < settings.max_model_len:
        problems.append(
            f"its rows have at most {info.max_model_len} tokens, the recipe's {settings.max_model_len}"
        )
    if info.logprobs_mode != "processed_logprobs":
        problems.append(
            f"its logprobs_mode is {info.logprobs_mode}, not processed_logprobs: its log-probs would ignore "
            "the temperature"
        )
    if info.quantization is not None:
        problems.append(f"its weights are quantized ({info.quantization}), so that no push could be proved")
    rank = settings.adapter_rank
    if rank is not None and info.adapter_rank < padded_rank(rank):
        problems.append(f"it takes adapters of rank {info.adapter_rank} at most, the recipe's is {rank}")
    if rank is None and info.adapter_rank:
        problems.append("it was started for adapters, and the recipe trains all weights")
    if problems:
        raise UserError(f"rollout.server.url {url}: {'; '.join(problems)}; start it with rltrain worker")
