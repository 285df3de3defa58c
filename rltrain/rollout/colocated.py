"""Rollouts sampled in the learner's own processes: each rank draws, samples and grades its share,
round by round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rltrain.process import ALONE, Process
from rltrain.protocols import Sampler
from rltrain.rollout.extra_samples import SampleSource
from rltrain.rollout.grading import Grader, correctness, is_informative, score_groups
from rltrain.rollout.groups import sample_groups
from rltrain.rollout.source import Rollouts
from rltrain.rollout.temperature import TemperatureController
from rltrain.rollout.verdicts import with_verdicts
from rltrain.seeds import stable_hash
from rltrain.types.samples import Prompt, RolloutGroup, Sampling, ScoredGroup

__all__ = ["ColocatedRollouts", "GradedSampler", "Order"]


class Order(Protocol):
    """Which prompts each step draws."""

    def next(self) -> list[int]: ...

    def observe(self, metrics: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class GradedSampler:
    """Samples with ``sampler`` and grades with ``grader``; implements ``Evaluates``."""

    sampler: Sampler
    grader: Grader
    process: Process = ALONE
    verdict_of: str | None = (
        None  # the only reward, a user's function: its scores of 0 and 1 then say what is correct
    )

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """Every rank samples its share; all ranks return the same groups, ordered by prompt id.

        What the engine caches of these prompts is kept apart: a training step that reused it would get
        log-probs that differ in rounding from those of a resumed run.
        """
        sampling = dataclasses.replace(sampling, cache="held out")
        groups = self.sample(self.process.share(prompts), sampling, version)
        graded = self.process.gather(score_groups(groups, self.grader, occasion))
        return sorted(graded, key=lambda group: group.prompt.id)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[RolloutGroup]:
        """Ungraded completions of exactly these prompts."""
        return sample_groups(self.sampler, prompts, sampling, version, self.process.deadline)

    def grade(
        self, groups: Sequence[RolloutGroup], step: int, seconds: dict[str, float]
    ) -> list[ScoredGroup]:
        """This rank's ``groups``, graded, together with those of the other ranks, ordered by group id."""
        with timed(seconds, "reward"):
            scored = score_groups(groups, self.grader, f"step {step}")
        ordered = sorted(self.process.gather(scored), key=lambda group: group.group)
        return with_verdicts(ordered, self.verdict_of)


@dataclass
class ColocatedRollouts:
    """Implements ``RolloutSource`` on an engine that shares the learner's processes and devices.

    wanted: groups per step. max_rounds: 1 trains on whatever was sampled; more replaces groups that are all
    correct or all wrong, as long as rounds last. keep: which groups dynamic sampling does not replace; None:
    the informative ones. verify: raises WeightMismatchError unless the engine sampled with the weights that
    were pushed last. release_memory: puts the engine to sleep, so that the learner has the device to itself.
    close_engine: ends what the sampler asks.
    """

    graded: GradedSampler
    order: Order
    prompts: Sequence[Prompt]
    sampling: Sampling  # its seed is the run's; every step and round derive their own
    wanted: int
    max_rounds: int
    verify: Callable[[], None]
    release_memory: Callable[[], None]
    close_engine: Callable[[], None]
    sources: Sequence[SampleSource] = ()  # further rows for the groups that the step trains on
    keep: Callable[[ScoredGroup], bool] | None = None
    temperature: TemperatureController | None = (
        None  # adapts the temperature token by token; None: ``sampling.temperature``
    )

    def take(self, step: int, version: int) -> Rollouts:
        """Samples rounds until enough groups are informative, adds the sources' rows, proves the
        weights, gives memory back.
        """
        kept: list[ScoredGroup] = []
        drawn: list[ScoredGroup] = []
        seconds = {"rollout": 0.0, "reward": 0.0, "sync": 0.0}
        rounds = 0
        while len(kept) < self.wanted and rounds < self.max_rounds:
            fresh = self._round(step, rounds, len(drawn), version, seconds)
            drawn += fresh
            kept += [group for group in fresh if self.max_rounds == 1 or (self.keep or is_informative)(group)]
            rounds += 1
        # without an informative group the step trains on what there is, and its line says why nothing moved
        groups = kept[: self.wanted] or drawn[: self.wanted]
        counts = tuple(sum(correct) for group in drawn if (correct := correctness(group)) is not None)

        metrics = {} if self.temperature is None else self.temperature.notes()
        for source in self.sources:
            groups = self._with_extra_samples(source, groups, step, version, seconds)
            metrics |= source.notes()

        with timed(seconds, "sync"):
            self.verify()
        self.release_memory()
        return Rollouts(tuple(groups), len(drawn), rounds, counts, seconds, metrics)

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        return self.graded.evaluate(prompts, sampling, version, occasion)

    def observe(
        self, metrics: Mapping[str, float], entropy: Tensor | None = None, sampled: Tensor | None = None
    ) -> None:
        for source in self.sources:
            source.observe(metrics["learner/entropy_mean"])
        self.order.observe(metrics)
        if self.temperature is not None and entropy is not None and sampled is not None:
            self.temperature.observe(entropy, sampled)

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": self.order.state_dict(),
            "sources": [source.state_dict() for source in self.sources],
            "temperature": {} if self.temperature is None else self.temperature.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        if self.temperature is not None:
            self.temperature.load_state_dict(state["temperature"])

    def close(self) -> None:
        sampler, deadline = self.graded.sampler, self.graded.process.deadline
        with deadline(f"the {sampler.name} engine", "to close"):
            sampler.close()
            self.close_engine()

    def _round(
        self, step: int, number: int, first_id: int, version: int, seconds: dict[str, float]
    ) -> list[ScoredGroup]:
        """One round of dynamic sampling: the next prompts, this rank's share sampled, everything graded."""
        chosen = self.graded.process.share(list(enumerate(self.order.next(), start=first_id)))
        sampling = dataclasses.replace(
            self.sampling, seed=stable_hash(self.sampling.seed, "rollout", step, number)
        )
        if self.temperature is not None:
            sampling = self.temperature.sampling(sampling)
        with timed(seconds, "rollout"):
            sampled = self.graded.sample([self.prompts[index] for _, index in chosen], sampling, version)
        numbered = [
            dataclasses.replace(group, group=id) for group, (id, _) in zip(sampled, chosen, strict=True)
        ]
        return self.graded.grade(numbered, step, seconds)

    def _with_extra_samples(
        self,
        source: SampleSource,
        groups: Sequence[ScoredGroup],
        step: int,
        version: int,
        seconds: dict[str, float],
    ) -> list[ScoredGroup]:
        """``groups`` with the graded completions that ``source`` adds, after those that are there."""
        share = self.graded.process.share(list(source.choose(groups)))
        with timed(seconds, "rollout"):
            sampled = source.sample(share, stable_hash(self.sampling.seed, "arm", source.code, step), version)
        added = {group.group: group for group in self.graded.grade(sampled, step, seconds)}
        return [_joined(group, added[group.group]) if group.group in added else group for group in groups]


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the block's wall-clock to ``seconds[phase]``."""
    started = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - started


def _joined(group: ScoredGroup, more: ScoredGroup) -> ScoredGroup:
    completions = group.completions + more.completions
    return dataclasses.replace(group, completions=completions, scores=group.scores + more.scores)
