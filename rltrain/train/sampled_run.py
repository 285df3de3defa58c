"""The parts of every run whose completions the current policy writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rltrain.checkpoint.random_state import random_state, restore_random_state
from rltrain.learner.passes import last_states
from rltrain.protocols import WorkersGone
from rltrain.report.spectrum import spectrum_metrics
from rltrain.rollout.source import PromptedSource, Rollouts
from rltrain.sync.adapter import AdapterSync
from rltrain.sync.colocated import Sync, WeightStream
from rltrain.timeline import Timeline
from rltrain.train.evaluate import Evaluation, Evaluator, first_completions
from rltrain.train.loop import TrainingRun
from rltrain.train.replayed import NoPush
from rltrain.train.saving import WithoutWorkers

__all__ = ["KeptWeights", "SampledRun"]


@dataclass
class KeptWeights:
    """A stream of weights that stays what it was when it was first read: a copy in the host's memory."""

    stream: WeightStream
    _held: dict[torch.dtype, list[tuple[str, Tensor]]] = field(default_factory=dict)

    def __call__(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        if dtype in self._held:
            yield from self._held[dtype]
            return
        held: list[tuple[str, Tensor]] = []
        for name, weight in self.stream(dtype):
            copy = weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype, copy=True)
            held.append((name, copy))
            yield name, weight
        self._held[dtype] = held


@dataclass(frozen=True, kw_only=True)
class SampledRun(TrainingRun):
    """A training run with an engine, which gets the learner's weights after each update."""

    source: PromptedSource
    sync: Sync | AdapterSync | NoPush
    evaluator: Evaluator | None
    # the engine may ask for the pushed weights again while the learner changes its own
    keeps_weights: bool = False
    # (step, seconds since 1970 at which learning began), from its rollouts to its push
    marks: list[tuple[int, float]] = field(default_factory=list)

    def push(self, *, expect_change: bool) -> dict[str, float]:
        """Copies the learner's weights to the engine and verifies the copy; returns metrics of the push."""
        self.settle()
        learner = self.learner
        norms = learner.weight_norms
        weights = self.sync.stream_of(learner)
        if self.keeps_weights:
            weights = KeptWeights(weights)
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

    def settle(self) -> None:
        """Waits until nothing is sampled any more. Raises WithoutWorkers where no worker is left: the policy
        has gone on meanwhile, so that the run goes back to its latest checkpoint.
        """
        try:
            self.source.settle()
        except WorkersGone as error:
            self.writer.wait()
            present = self.writer.folder.present_checkpoints()
            step, checkpoint = present[-1] if present else (0, None)
            raise WithoutWorkers(step, checkpoint, str(error)) from error

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
        evaluator = self.evaluator
        version = self.learner.version
        if evaluator is None or not (evaluator.versions is None or version in evaluator.versions):
            return None
        result = evaluator.evaluate(self.source, version)
        self.sync.verify_all(self.sync.stream_of(self.learner))
        self.reporter.message_once(result.note)
        if not self.recipe.eval.spectrum:
            return result
        states = last_states(self.learner.trained, first_completions(result.groups))
        return replace(result, spectrum=spectrum_metrics(states))

    def close(self) -> None:
        self.source.close()
        self.reporter.close()
