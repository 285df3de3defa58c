"""Pushes the learner's weights to workers on other processes or machines, and proves that they arrived.

At every push every weight is compared, by two numbers a weight that both sides compute from their shards. A
worker is paused before any rank gathers, and resumed only after its proof: vLLM's engine dies if it samples
after a transfer that failed. One complete push to a worker that is still paused mends a failure; a worker
that fails twice is lost, and one whose proof fails is quarantined.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rltrain.errors import UserError
from rltrain.sync.colocated import WeightStream
from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.sync.targets import WorkerControl
from rltrain.sync.transport import WORKER_ERRORS, Channel, Pace, Sender, start_call, wait_for
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import PolicyVersion
from rltrain.weight_transfer import ProcessSums, open_store

__all__ = ["PushReport", "ServerSync", "WorkerLink", "merge_copies"]

RTOL = 1e-12  # weights are compared as stored, except for the order of float64 sums


@dataclass
class WorkerLink:
    """Everything about the weights of one worker, on rank 0 of the learner.

    backend: ``gloo``, or ``nccl`` between GPUs. host: this machine's address as the worker sees it. ties:
    second name of a weight to its first; the second is not sent. capacity: bytes of a bucket.
    """

    name: str
    control: WorkerControl
    dtype: torch.dtype
    ties: Mapping[str, str]
    capacity: int
    device: torch.device
    host: str = "127.0.0.1"
    backend: Literal["gloo", "nccl"] = "gloo"
    pace: Pace = field(default_factory=Pace)
    mode: Literal["keep", "wait", "abort"] = "keep"
    version: PolicyVersion | None = None
    _before: Sequence[ProcessSums] = ()  # of the last push that was proved
    _held: Sequence[ProcessSums] = ()

    def __post_init__(self) -> None:
        store = open_store(self.host)
        self.channel = Channel(self.name, self.control, store, self.host, self.backend, self.pace)

    def pause(self) -> None:
        """Until it is proved to hold a version, it holds none."""
        self.version = None
        self.channel.error = None
        self.channel.call("pause", self.control.pause, self.mode, True)

    def begin(self) -> None:
        """Joins the transfer, if it has not, and starts an update.

        A worker that joins forgets an unfinished push: of this learner, or of one that died in its middle.
        """
        if self.channel.group is None:
            calls = self.control.call_workers
            self.channel.call("forget an unfinished push", calls, "rltrain_abandon", {})
        self.channel.join()
        self.channel.call("start an update", self.control.start_update)

    def recover(self) -> None:
        """Prepares another complete push to the worker, which is still paused after one that failed.

        Raises an error where the worker's processes do not answer.
        """
        self.channel.fail(self.channel.error or RuntimeError("the push failed"))
        self.channel.error = None
        self.require_alive()
        self.channel.call("pause", self.control.pause, self.mode, True)
        self.begin()

    def require_alive(self) -> None:
        """Raises TimeoutError where the worker's processes do not answer; its server alone is no proof."""
        call = start_call(self.control.call_workers, "rltrain_alive", {})
        wait_for(
            call,
            self.pace.alive_seconds,
            f"{self.name} has to give a sign of life",
        )

    def finish(self, version: PolicyVersion) -> None:
        self.channel.call("finish the update", self.control.finish_update, str(version))

    def resume(self, version: PolicyVersion) -> None:
        self.channel.call("sample again", self.control.resume)
        self.version = version

    def read(self, names: Collection[str] | None = None) -> list[dict[str, Fingerprint]]:
        """The fingerprints of every copy of the weights that the worker's processes compute with. names: of
        these alone.

        Raises UserError for a model with a weight that cannot be read back.
        """
        arguments = {} if names is None else {"names": json.dumps(sorted(names))}
        held = self._ask_processes("rltrain_fingerprint", arguments)
        if names is None:
            self._held = held
        return combine_copies([process.sums for process in held])

    def take_proof(self, key: str) -> list[dict[str, Fingerprint]]:
        """``read`` of all weights, from what the processes published when they finished the push."""
        self._held = self._take_sums(key)
        return combine_copies([process.sums for process in self._held])

    def read_adapter(self, identity: int, rank: int) -> list[dict[str, Fingerprint]]:
        """The same of every copy of an adapter. identity: vLLM's number of it. rank: of its matrices."""
        arguments = {"identity": str(identity), "rank": str(rank)}
        held = self._ask_processes("rltrain_adapter_fingerprint", arguments)
        return combine_copies([process.sums for process in held])

    def _ask_processes(self, method: str, arguments: Mapping[str, str]) -> list[ProcessSums]:
        """What every process of the worker publishes when it is asked. Raises UserError for a refusal."""
        key = new_proof()
        self.channel.call("read its weights", self.control.call_workers, method, {"key": key, **arguments})
        return self._take_sums(key)

    def _take_sums(self, key: str) -> list[ProcessSums]:
        """What every process has published below ``key``. Raises UserError for a refusal."""
        assert self.channel.group is not None, "no transfer has taken place"
        store = self.channel.group.store
        keys = [f"{key}/{rank}" for rank in range(1, self.channel.members + 1)]
        if not store.check(keys):
            raise RuntimeError(f"{self.name}: not all of its {len(keys)} processes have read their weights")
        held = [ProcessSums.from_json(store.get(each)) for each in keys]
        for each in keys:
            store.delete_key(each)
        if refusals := [process.refusal for process in held if process.refusal]:
            raise UserError(f"{self.name}: {refusals[0]}")
        return held

    def prove(
        self, expected: Mapping[str, Fingerprint], copies: Sequence[Mapping[str, Fingerprint]]
    ) -> float:
        """The largest relative difference of a fingerprint. copies: what ``read`` has just returned.

        Raises WeightMismatchError where one differs.
        """
        worst = 0.0
        for held in copies:
            try:
                compare(expected, held, RTOL)
            except WeightMismatchError as error:
                raise WeightMismatchError(f"{self.name}: {error}{self._stale_processes(expected)}") from None
            for name, fingerprint in expected.items():
                difference = abs(held[name].number - fingerprint.number)
                worst = max(worst, difference / max(abs(fingerprint.number), 1e-30))
        self._before = self._held
        return worst

    def _stale_processes(self, expected: Mapping[str, Fingerprint]) -> str:
        """Which processes still hold a part of the version before, while others hold a new one."""
        lines: list[str] = []
        for name in expected:
            parts = [
                (process, held.own(name) == before.own(name))
                for process, (held, before) in enumerate(zip(self._held, self._before, strict=False))
                if held.own(name) is not None
            ]
            stale = [process for process, is_equal in parts if is_equal]
            if stale and len(stale) < len(parts):
                lines.append(f"{name} in process {', '.join(map(str, stale))}")
        if not lines:
            return ""
        others = f" and {len(lines) - 3} other weights" if len(lines) > 3 else ""
        return f". Parts of the push before are still there: {'; '.join(lines[:3])}{others}"

    # one worker alone, as an engine's weights ---------------------------------------------------------------

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """Pushes ``stream`` as ``version``, and the worker samples again; the caller compares fingerprints.

        Raises the transfer's error without resuming; another ``load`` recovers.
        """
        begin = self.begin if self.channel.error is None else self.recover
        self._keep_error(self.pause)
        self._keep_error(begin)
        sender = Sender([self.channel], self.dtype, self.capacity, self.device, frozenset(self.ties))
        sender.send(stream)
        if self.channel.error is not None:
            raise self.channel.error
        self._keep_error(self.finish, version)
        self._keep_error(self.resume, version)

    def _keep_error(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls, and keeps what it raises, so that the next push begins with a recovery."""
        try:
            call(*arguments)
        except WORKER_ERRORS as error:
            self.channel.fail(error)
            raise

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``; where copies differ, the number of the weight is NaN."""
        return merge_copies(self.read(names))

    def close(self) -> None:
        self.channel.fail(RuntimeError(f"{self.name} was closed"))


def new_proof() -> str:
    """A key of the store that nobody has used."""
    return f"proof/{secrets.token_hex(8)}"


def merge_copies(copies: Sequence[Mapping[str, Fingerprint]]) -> dict[str, Fingerprint]:
    """The fingerprints that all copies have; NaN where they differ."""
    first, *others = copies
    merged = dict(first)
    for name, fingerprint in first.items():
        if any(not _is_equal(copy.get(name), fingerprint) for copy in others):
            merged[name] = Fingerprint(math.nan, math.nan)
    return merged


def _is_equal(held: Fingerprint | None, other: Fingerprint) -> bool:
    return held is not None and math.isclose(held.number, other.number, rel_tol=RTOL)


def combine_copies(sums: Sequence[Mapping[str, tuple[float, float, int]]]) -> list[dict[str, Fingerprint]]:
    """The fingerprints of every copy: the parts of one copy added up over the processes.

    The n-th result has the n-th copy of each weight; a weight with fewer copies appears again and again.
    """
    totals: dict[str, dict[int, tuple[float, float]]] = {}
    for process in sums:
        for name, (projection, square, copy) in process.items():
            parts = totals.setdefault(name, {})
            before = parts.get(copy, (0.0, 0.0))
            parts[copy] = before[0] + projection, before[1] + square
    count = max((len(parts) for parts in totals.values()), default=1)
    ordered = {name: [parts[copy] for copy in sorted(parts)] for name, parts in totals.items()}
    return [
        {name: Fingerprint(*parts[min(place, len(parts) - 1)]) for name, parts in ordered.items()}
        for place in range(count)
    ]


@dataclass(frozen=True)
class PushReport:
    """What became of a push. served: workers that sample with it; lost, quarantined: why, by worker."""

    served: tuple[str, ...]
    lost: Mapping[str, Exception]
    quarantined: Mapping[str, WeightMismatchError]
    checked: int  # weights compared, in each worker
    difference: float  # largest relative one


@dataclass
class ServerSync:
    """Pushes to ``links``: on rank 0 its workers, on the other ranks none.

    dtype: on the wire, equal on every rank. share: rank 0's value on every rank. fingerprints: of every
    weight rounded to a dtype, from the learner's shards, a collective. record: see ``Sender``.
    """

    links: Sequence[WorkerLink]
    dtype: torch.dtype
    share: Callable[[Any], Any]
    fingerprints: Callable[[torch.dtype], Mapping[str, Fingerprint]]
    attempts: int = 2
    record: Callable[[str, Tensor], None] | None = None

    def push(self, weights: WeightStream, version: PolicyVersion) -> PushReport:
        """A collective of the learner's ranks. Workers that are served hold ``version``, proved.

        Gathers start after every worker has paused. A worker that fails has one more complete push, while it
        is paused; it is never resumed after a failure.
        """
        errors: dict[str, Exception] = {}
        quarantined: dict[str, WeightMismatchError] = {}
        differences: dict[str, float] = {}
        paused = self._each(self.links, WorkerLink.pause, errors)
        active = self._each(paused, WorkerLink.begin, errors)
        expected: Mapping[str, Fingerprint] = {}
        for attempt in range(self.attempts):
            if attempt:
                failed = [link for link in paused if link.name in errors]
                active = self._each(failed, WorkerLink.recover, errors)
            if not self.share(bool(active)):
                continue
            proof = new_proof()
            sent = self._send(active, weights, proof, errors)
            finished = self._each(sent, lambda link: link.finish(version), errors)
            expected = expected or self.fingerprints(self.dtype)
            self._prove(finished, proof, expected, version, errors, quarantined, differences)
        served = tuple(link.name for link in self.links if link.version == version)
        lost = {name: error for name, error in errors.items() if name not in quarantined}
        worst = max(differences.values(), default=0.0)
        return PushReport(served, lost, quarantined, len(expected), worst)

    def _send(
        self, links: Sequence[WorkerLink], weights: WeightStream, proof: str, errors: dict[str, Exception]
    ) -> list[WorkerLink]:
        """Sends all weights; returns the links that took all of them."""
        channels = [link.channel for link in links]
        first = links[0] if links else None
        capacity = max((link.capacity for link in links), default=0)
        device = torch.device("cpu") if first is None else first.device
        ties = frozenset() if first is None else frozenset(first.ties)
        sender = Sender(channels, self.dtype, capacity, device, ties, self.record, proof)
        sender.send(weights(self.dtype))
        for link in links:
            if link.channel.error is not None:
                errors[link.name] = link.channel.error
        return [link for link in links if link.channel.error is None]

    def _prove(
        self,
        links: Sequence[WorkerLink],
        proof: str,
        expected: Mapping[str, Fingerprint],
        version: PolicyVersion,
        errors: dict[str, Exception],
        quarantined: dict[str, WeightMismatchError],
        differences: dict[str, float],
    ) -> None:
        """Compares every weight of every worker, and resumes those that hold them."""

        def prove(link: WorkerLink) -> None:
            try:
                differences[link.name] = link.prove(expected, link.take_proof(proof))
            except WeightMismatchError as error:
                quarantined[link.name] = error
                return
            link.resume(version)

        self._each(links, prove, errors)

    def _each(
        self,
        links: Sequence[WorkerLink],
        call: Callable[[WorkerLink], None],
        errors: dict[str, Exception],
    ) -> list[WorkerLink]:
        """Calls for all links at once; returns those without an error, whose older error is forgotten."""
        calls = [(link, start_call(call, link)) for link in links]
        done: list[WorkerLink] = []
        for link, future in calls:
            try:
                future.result()
            except WORKER_ERRORS as error:
                link.channel.fail(error)
                errors[link.name] = error
            else:
                errors.pop(link.name, None)
                done.append(link)
        return done
