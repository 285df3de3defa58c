"""The rollouts of a finished run in place of an engine: the same steps again, or another method on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rltrain.checkpoint.journal import Journal
from rltrain.process import Process
from rltrain.rollout.source import Rollouts
from rltrain.sync.colocated import WeightOwner, WeightStream
from rltrain.train.journaled import restore_generators, rollouts_of, share_record
from rltrain.types.samples import Prompt, Sampling, ScoredGroup

__all__ = ["NoPush", "ReplayedRollouts"]


@dataclass
class ReplayedRollouts:
    """Implements ``RolloutSource`` on a journal; rank 0 reads it.

    digests: of the weights of the run that wrote the journal, by version; empty: the weights are others, and
    nothing is compared. weights_digest: of the learner's; a collective.
    """

    journal: Journal
    process: Process
    digests: Mapping[int, str]
    weights_digest: Callable[[], str]
    # by step, whether the weights before it are those of the run that wrote the journal
    comparisons: dict[int, bool] = field(default_factory=dict)
    evaluations: dict[int, bool] = field(default_factory=dict)  # the same, by the version that was evaluated
    _state: dict[str, Any] = field(default_factory=lambda: {"order": {}, "sources": [], "temperature": {}})

    @property
    def prompts(self) -> Sequence[Prompt] | None:
        return None

    def take(self, step: int, version: int) -> Rollouts:
        """The rollouts that ``step`` was trained on. Raises UserError where its file is damaged."""
        if version in self.digests:
            self.comparisons[step] = self.weights_digest() == self.digests[version]
        record = share_record(self.process, [self.journal.read(step)] if self.process.is_main else [])
        assert record is not None
        self._state = dict(record.header.state)
        restore_generators(record.header.random, self.process.rank)
        return rollouts_of(record)

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """What the run sampled at this evaluation. Raises UserError where its file is damaged."""
        read = [self.journal.read_evaluation(version)] if self.process.is_main else []
        record = share_record(self.process, read)
        assert record is not None
        self.evaluations[version] = self.weights_digest() == record.weights
        restore_generators(record.random, self.process.rank)
        return list(record.groups)

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        """Nothing adapts: what each step was trained on is known."""

    def settle(self) -> None: ...

    def release_memory(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)

    def close(self) -> None: ...


@dataclass
class NoPush:
    """Takes the place of ``Sync`` where no engine wants the weights."""

    pushes: int = 0

    def stream_of(self, learner: WeightOwner) -> WeightStream:
        return lambda dtype: _no_weights()

    def push(
        self,
        weights: WeightStream,
        version: int,
        *,
        expect_change: bool,
        norms: Callable[[], tuple[float, ...]] = tuple,
    ) -> dict[str, float]:
        """Pushes nothing, and has no metrics."""
        return {}

    def verify_all(self, weights: WeightStream) -> None: ...


def _no_weights() -> Iterator[tuple[str, Tensor]]:
    return iter(())
