"""Pushes to the workers of a pool, which come and go between two pushes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltrain.sync.server import RTOL, PushReport, ServerSync, WorkerLink
from rltrain.sync.targets import WorkerControl
from rltrain.sync.transport import WORKER_ERRORS, Sender, start_call
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import PolicyVersion

__all__ = ["PoolPush", "PushCost", "merge_fingerprints"]


@dataclass(frozen=True)
class PushCost:
    """Of a push: bytes of the weights, workers that hold them, seconds from the pause to the last proof."""

    bytes: int
    workers: int
    seconds: float


@dataclass
class PoolPush:
    """make_link: the link to a worker, by its name and its client. dtype: of the workers' weights, equal on
    every rank. ties: second name of a weight to its first. share: rank 0's value on every rank. is_main:
    of rank 0, which says what was sent, also where no worker is left.
    """

    make_link: Callable[[str, WorkerControl], WorkerLink]
    dtype: torch.dtype
    ties: Mapping[str, str]
    share: Callable[[Any], Any]
    is_main: bool = True
    cost: PushCost | None = None  # of the last push that anybody took
    _links: dict[str, WorkerLink] = field(default_factory=dict)
    _sent: dict[str, Fingerprint] = field(default_factory=dict)
    _proved: frozenset[str] = frozenset()  # links whose fingerprints were compared after the last push

    def push(
        self,
        workers: Mapping[str, WorkerControl],
        weights: Iterable[tuple[str, Tensor]],
        version: PolicyVersion,
    ) -> tuple[tuple[str, ...], Mapping[str, Exception], Mapping[str, Exception]]:
        """The workers that were served, lost and quarantined; a collective of the ranks.

        A worker that fails has a second complete push while it is paused.
        """
        start = time.perf_counter()
        links = [self._link(name, control) for name, control in workers.items()]
        recorder = _Recorder(weights, self.ties)
        record = recorder.record if links or self.is_main else None
        attempts = 1 if iter(weights) is weights else 2  # an iterator can be read once only
        sync = ServerSync(links, self.dtype, self.share, lambda dtype: recorder.sums, attempts, record)
        report = sync.push(lambda dtype: iter(recorder), version)
        if not recorder.is_read:  # nobody was sent anything; the ranks agree on that
            Sender((), self.dtype, 0, torch.device("cpu"), record=record).send(recorder)
        if recorder.sums:
            self._sent = recorder.sums
        self._proved = frozenset(report.served)
        if report.served:
            seconds = time.perf_counter() - start
            self.cost = PushCost(recorder.bytes, len(report.served), seconds)
        if report.quarantined and not report.served:  # so that the comparison fails
            self._sent = self._read_refused(report)
        for name in {*report.lost, *report.quarantined}:
            self._links.pop(name).close()
        return report.served, report.lost, report.quarantined

    def read(
        self, workers: Mapping[str, WorkerControl]
    ) -> tuple[Mapping[str, Fingerprint], Mapping[str, Exception]]:
        """See ``PoolPusher.read``. What a push has just proved is not read again."""
        names = [name for name in workers if name in self._links and name not in self._proved]
        self._proved = frozenset()
        calls = [(name, start_call(self._links[name].fingerprint)) for name in names]
        merged = dict(self._sent)
        errors: dict[str, Exception] = {}
        for name, call in calls:
            try:
                held = call.result()
            except WORKER_ERRORS as error:
                errors[name] = error
                continue
            merged = merge_fingerprints(merged, held)
        return merged, errors

    def _read_refused(self, report: PushReport) -> dict[str, Fingerprint]:
        """What a quarantined worker multiplies with."""
        name = next(iter(report.quarantined))
        try:
            return dict(self._links[name].fingerprint())
        except WORKER_ERRORS:
            return {name: Fingerprint(math.nan, math.nan) for name in self._sent}

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _link(self, name: str, control: WorkerControl) -> WorkerLink:
        """The worker's link; a worker that came back has another client, and gets a new one."""
        link = self._links.get(name)
        if link is None or link.control is not control:
            if link is not None:
                link.close()
            link = self._links[name] = self.make_link(name, control)
        return link


def merge_fingerprints(
    expected: Mapping[str, Fingerprint], held: Mapping[str, Fingerprint]
) -> dict[str, Fingerprint]:
    """What workers have together, of the weights in ``expected``."""
    return {name: _merge(fingerprint, held.get(name)) for name, fingerprint in expected.items()}


def _merge(expected: Fingerprint, held: Fingerprint | None) -> Fingerprint:
    """What the workers have together: the first that differs from the others is no weight's."""
    if held is not None and math.isclose(held.number, expected.number, rel_tol=RTOL):
        return expected
    return held or Fingerprint(math.nan, math.nan)


@dataclass
class _Recorder:
    """Passes weights on, and keeps the fingerprints of what is sent of them, second names included."""

    weights: Iterable[tuple[str, Tensor]]
    ties: Mapping[str, str]
    sums: dict[str, Fingerprint] = field(default_factory=dict)
    is_read: bool = False
    bytes: int = 0

    def __post_init__(self) -> None:
        self._second_names: dict[str, list[str]] = {}
        for second, first in self.ties.items():
            self._second_names.setdefault(first, []).append(second)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.is_read = True
        self.bytes = 0
        return iter(self.weights)

    def record(self, name: str, weight: Tensor) -> None:
        """A second name has the numbers of the first, unless the learner reads a weight under it too."""
        self.bytes += weight.numel() * weight.element_size()
        self.sums[name] = weight_fingerprint(name, weight)
        for second in self._second_names.get(name, ()):
            if second not in self.sums:
                self.sums[second] = weight_fingerprint(second, weight)
