"""The parts of every run whose completions the current policy writes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from rltrain.checkpoint.random_state import random_state, restore_random_state
from rltrain.protocols import WorkersGone
from rltrain.rollout.source import PromptedSource, Rollouts
from rltrain.sync.adapter import AdapterSync
from rltrain.sync.colocated import Sync
from rltrain.timeline import Timeline
from rltrain.train.evaluate import Evaluation, Evaluator
from rltrain.train.loop import TrainingRun
from rltrain.train.replayed import NoPush

__all__ = ["SampledRun"]


@dataclass(frozen=True, kw_only=True)
class SampledRun(TrainingRun):
    """A training run with an engine, which gets the learner's weights after each update."""

    source: PromptedSource
    sync: Sync | AdapterSync | NoPush
    evaluator: Evaluator | None
    # (step, seconds since 1970 at which learning began), from its rollouts to its push
    marks: list[tuple[int, float]] = field(default_factory=list)

    def push(self, *, expect_change: bool) -> dict[str, float]:
        """Copies the learner's weights to the engine and verifies the copy; returns metrics of the push."""
        learner = self.learner
        norms = learner.weight_norms
        weights = self.sync.stream_of(learner)
        start = time.time()
        if self.marks:
            step, began = self.marks.pop()
            self.timeline.add("learner", "learn", began, start, step=step)
        metrics = self.sync.push(weights, learner.version, expect_change=expect_change, norms=norms)
        self.timeline.add("learner", "push", start, version=learner.version)
        return metrics

    @cached_property
    def timeline(self) -> Timeline:
        """Written by rank 0."""
        return Timeline(self.writer.folder.timeline if self.learner.rank == 0 else None)

    def take(self, step: int) -> Rollouts:
        """The rollouts of ``step``. Where no worker is left, the run is saved as it was before the step.

        Raises WithoutWorkers.
        """
        before = self.source.state_dict()
        generators = random_state()
        start = time.time()
        try:
            rollouts = self.source.take(step, self.learner.version)
        except WorkersGone as error:
            self.source.load_state_dict(before)
            restore_random_state(generators)
            self.leave_without_workers(step - 1, error)
        self.source.release_memory()
        self.timeline.add("learner", "wait", start, step=step)
        self.marks[:] = [(step, time.time())]
        return rollouts

    def evaluate(self) -> Evaluation | None:
        """Held-out pass@k of the current weights; None where the recipe holds nothing out."""
        if self.evaluator is None:
            return None
        result = self.evaluator.evaluate(self.source, self.learner.version)
        self.sync.verify_all(self.sync.stream_of(self.learner))
        self.reporter.message_once(result.note)
        return result

    def close(self) -> None:
        self.source.close()
        self.reporter.close()
