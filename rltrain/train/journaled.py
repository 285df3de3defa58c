"""A rollout source whose rollouts are on the disk before anything is trained on them.

A run that was killed finds them there: a step's rollouts are used again where the weights are, to the bit,
those that sampled them, and everything else that they follow from is the same; otherwise they are sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from rltrain.checkpoint.journal import EvaluationRecord, Journal, StepHeader, StepRecord, origin_of
from rltrain.checkpoint.random_state import random_state, restore_random_state
from rltrain.errors import UserError
from rltrain.process import Process
from rltrain.rollout.controller import ControlledRollouts
from rltrain.rollout.packed import pack_groups, unpack_groups
from rltrain.rollout.source import PromptedSource, Rollouts
from rltrain.types.samples import Prompt, Sampling, ScoredGroup

__all__ = ["JournaledRollouts", "restore_generators", "rollouts_of", "share_record"]

_Record = TypeVar("_Record", StepRecord, EvaluationRecord)


def rollouts_of(record: StepRecord) -> Rollouts:
    """The rollouts of a step, as they were when they were written."""
    header = record.header
    return Rollouts(
        groups=record.groups,
        generated_groups=header.generated_groups,
        rounds=header.rounds,
        correct_counts=tuple(header.correct_counts),
        seconds=dict(header.seconds),
        metrics=dict(header.metrics),
    )


def share_record(process: Process, records: Sequence[_Record]) -> _Record | None:
    """Rank 0's record on every rank, None if it has none. Its groups cross between processes as arrays."""
    if process.world_size == 1:
        return next(iter(records), None)
    shared = process.gather(
        [(replace(record, groups=()), pack_groups(record.groups, {})) for record in records]
    )
    if not shared or records:
        return next(iter(records), None)
    record, packed = shared[0]
    return replace(record, groups=tuple(unpack_groups(packed, {})))


@dataclass(frozen=True)
class JournaledRollouts:
    """Implements ``RolloutSource`` on ``inner``; every rank calls every method, and rank 0 reads and writes.

    weights_digest: of the learner's weights, which the engine has when ``begin`` is called; a collective.
    settings: text of the inputs that the samples depend on besides weights and state. environment: the
    software, for the files' headers.
    """

    inner: PromptedSource
    journal: Journal
    process: Process
    weights_digest: Callable[[], str]
    settings: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    origins: dict[int, str] = field(default_factory=dict)  # by step, of what this process took

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        return self.inner.prompts

    def take(self, step: int, version: int) -> Rollouts:
        """The rollouts of ``step``, from the disk or sampled and then written to it."""
        return self.begin(step, version)()

    def begin(self, step: int, version: int, *, draws: bool = True) -> Callable[[], Rollouts]:
        """What ``take`` does, in two parts: this one needs the learner; what it returns does not, so that the
        learner may go on meanwhile.

        draws: nothing else in this process draws random numbers until the second part is over, so that those
        which sampling drew are known. Otherwise a controller begins to sample in the first part.
        """
        weights = self.weights_digest()
        origin = origin_of(step, version, weights, self.inner.state_dict(), self.settings)
        self.origins[step] = origin
        kept = self._read_same(step, origin)
        if kept is not None:
            self.inner.load_state_dict(kept.header.state)
            restore_generators(kept.header.random, self.process.rank)
            rollouts = rollouts_of(kept)
            return lambda: rollouts

        take = partial(self.inner.take, step, version)
        if isinstance(self.inner, ControlledRollouts) and not draws:
            take = self.inner.ask(step, version)

        def sample() -> Rollouts:
            before = random_state() if draws else {}
            sampled = take()
            drawn = self.process.gather([changed_generators(before)]) if draws else []
            if self.process.is_main:
                self._write(step, version, weights, origin, sampled, drawn if any(drawn) else [])
            return sampled

        return sample

    def find(self, step: int, origin: str) -> Rollouts | None:
        """The rollouts of ``step`` from the disk, if they are of this origin. A collective."""
        self.origins[step] = origin
        record = self._read_same(step, origin)
        return None if record is None else rollouts_of(record)

    def _read_same(self, step: int, origin: str) -> StepRecord | None:
        """The step's rollouts from the disk, if sampling would give the same; a damaged file gives none."""
        records: list[StepRecord] = []
        if self.process.is_main:
            try:
                if self.journal.read_header(step).origin == origin:
                    records = [self.journal.read(step)]
            except (FileNotFoundError, UserError):
                records = []
        return share_record(self.process, records)

    def _write(
        self,
        step: int,
        version: int,
        weights: str,
        origin: str,
        rollouts: Rollouts,
        drawn: Sequence[Mapping[str, Any]],
    ) -> None:
        header = StepHeader(
            step=step,
            version=version,
            weights=weights,
            origin=origin,
            state=self.inner.state_dict(),
            generated_groups=rollouts.generated_groups,
            rounds=rollouts.rounds,
            correct_counts=rollouts.correct_counts,
            seconds=rollouts.seconds,
            metrics=rollouts.metrics,
            random=drawn,
            environment=self.environment,
        )
        self.journal.write(StepRecord(header, rollouts.groups))
        self.journal.prune()

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """From the disk or sampled and then written to it, as the rollouts of a step."""
        weights = self.weights_digest()
        asked = [[prompt.id for prompt in prompts], asdict(sampling), self.settings]
        request = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        kept = self._read_evaluation(version, weights, request)
        if kept is not None:
            restore_generators(kept.random, self.process.rank)
            return list(kept.groups)
        before = random_state()
        groups = self.inner.evaluate(prompts, sampling, version, occasion)
        drawn = self.process.gather([changed_generators(before)])
        if self.process.is_main:
            random = drawn if any(drawn) else []
            self.journal.write_evaluation(EvaluationRecord(version, weights, request, random, tuple(groups)))
        return groups

    def _read_evaluation(self, version: int, weights: str, request: str) -> EvaluationRecord | None:
        records: list[EvaluationRecord] = []
        if self.process.is_main:
            try:
                record = self.journal.read_evaluation(version)
            except (FileNotFoundError, UserError):
                record = None
            if record is not None and (record.weights, record.request) == (weights, request):
                records = [record]
        return share_record(self.process, records)

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        self.inner.observe(metrics, entropy, sampled)

    def settle(self) -> None:
        self.inner.settle()

    def release_memory(self) -> None:
        self.inner.release_memory()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def close(self) -> None:
        self.inner.close()


def restore_generators(random: Sequence[Mapping[str, Any]], rank: int) -> None:
    """The generators as sampling left them, where it drew from them."""
    if rank < len(random) and random[rank]:
        restore_random_state(random[rank])


def changed_generators(before: Mapping[str, Any]) -> dict[str, Any]:
    """The generators' state, if it is no longer ``before``."""
    after = random_state()
    return {} if after == before else after
