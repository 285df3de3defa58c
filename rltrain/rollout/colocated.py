"""Rollouts sampled in the learner's own processes: in each round every rank samples and grades its share of
the next prompts.
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
from rltrain.rollout.packed import pack_groups, unpack_groups
from rltrain.rollout.source import Rollouts
from rltrain.rollout.temperature import TemperatureController
from rltrain.rollout.verdicts import add_verdicts
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
    """Samples with ``sampler`` and grades with ``grader``; implements ``EvaluationSource``."""

    sampler: Sampler
    grader: Grader
    process: Process = ALONE
    # label of the only reward if it is a user's function: its scores of 0 and 1 then say what is correct
    verdict_of: str | None = None

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, version: int, occasion: str = ""
    ) -> list[ScoredGroup]:
        """Every rank samples its share; all ranks return the same groups, ordered by prompt id.

        The engine caches these prompts apart from those of training: a training step that reused the cache
        would get log-probs that differ in rounding from those of a resumed run.
        """
        sampling = dataclasses.replace(sampling, cache="held out")
        groups = self.sample(self.process.share(prompts), sampling, version)
        scored = score_groups(groups, self.grader, occasion)
        self.process.meet()
        return sorted(self._gather(scored), key=lambda group: group.prompt.id)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[RolloutGroup]:
        """Ungraded completions of these prompts, without dividing them among the ranks."""
        return sample_groups(self.sampler, prompts, sampling, version, self.process.deadline)

    def grade(
        self, groups: Sequence[RolloutGroup], step: int, seconds: dict[str, float]
    ) -> list[ScoredGroup]:
        """Grades this rank's ``groups``; returns the graded groups of all ranks, ordered by group id."""
        with add_time(seconds, "reward"):
            scored = score_groups(groups, self.grader, f"step {step}")
        self.process.meet()
        ordered = sorted(self._gather(scored), key=lambda group: group.group)
        return add_verdicts(ordered, self.verdict_of)

    def _gather(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """Those of all ranks, which cross between processes as arrays."""
        if self.process.world_size == 1:
            return groups
        parts = self.process.gather([pack_groups(groups, {})])
        return [group for part in parts for group in unpack_groups(part, {})]


@dataclass
class ColocatedRollouts:
    """Implements ``RolloutSource`` on an engine that shares the learner's processes and devices.

    max_rounds: 1 trains on every sampled group; with more, dynamic sampling replaces groups that are all
    correct or all wrong, as long as rounds are left. keep: which groups dynamic sampling keeps; None: the
    informative ones. verify: raises WeightMismatchError unless the engine sampled with the weights that were
    pushed last. put_to_sleep: the engine, so that the learner has the device to itself. close_engine: ends
    the engine under the sampler.
    """

    graded: GradedSampler
    order: Order
    prompts: Sequence[Prompt]
    sampling: Sampling  # with the run's seed, from which every step and round derives its own
    groups_per_step: int
    max_rounds: int
    verify: Callable[[], None]
    put_to_sleep: Callable[[], None]
    close_engine: Callable[[], None]
    # numbers of the step about the engine itself, as metrics
    engine_notes: Callable[[], Mapping[str, float]] = dict
    sources: Sequence[SampleSource] = ()  # further rows for the groups that the step trains on
    keep: Callable[[ScoredGroup], bool] | None = None
    # adapts the temperature token by token; None: every token is drawn at ``sampling.temperature``
    temperature: TemperatureController | None = None

    def take(self, step: int, version: int) -> Rollouts:
        """Samples rounds until enough groups are informative, adds the rows of extra sources, and verifies
        the engine's weights.
        """
        kept: list[ScoredGroup] = []
        sampled: list[ScoredGroup] = []
        seconds = {"rollout": 0.0, "reward": 0.0, "sync": 0.0}
        is_kept = self.keep or is_informative
        rounds = 0
        while len(kept) < self.groups_per_step and rounds < self.max_rounds:
            new_groups = self._sample_round(step, rounds, len(sampled), version, seconds)
            sampled += new_groups
            kept += [group for group in new_groups if self.max_rounds == 1 or is_kept(group)]
            rounds += 1
        # without an informative group the step trains on any group, and its line says why no weight changed
        groups = kept[: self.groups_per_step] or sampled[: self.groups_per_step]
        counts = tuple(sum(correct) for group in sampled if (correct := correctness(group)) is not None)

        metrics = {} if self.temperature is None else self.temperature.notes()
        for source in self.sources:
            groups = self._add_extra_samples(source, groups, step, version, seconds)
            metrics |= source.notes()
        metrics |= self.engine_notes()

        with add_time(seconds, "sync"):
            self.verify()
        return Rollouts(tuple(groups), len(sampled), rounds, counts, seconds, metrics)

    def settle(self) -> None: ...

    def release_memory(self) -> None:
        self.put_to_sleep()

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
        sampler = self.graded.sampler
        deadline = self.graded.process.deadline
        with deadline(f"the {sampler.name} engine", "to close"):
            sampler.close()
            self.close_engine()

    def _sample_round(
        self, step: int, number: int, first_id: int, version: int, seconds: dict[str, float]
    ) -> list[ScoredGroup]:
        """One round of dynamic sampling: samples and grades this rank's share of the next prompts; returns
        the groups of all ranks.
        """
        share = self.graded.process.share(list(enumerate(self.order.next(), start=first_id)))
        seed = stable_hash(self.sampling.seed, "rollout", step, number)
        sampling = dataclasses.replace(self.sampling, seed=seed)
        if self.temperature is not None:
            sampling = self.temperature.sampling(sampling)
        with add_time(seconds, "rollout"):
            sampled = self.graded.sample([self.prompts[index] for _, index in share], sampling, version)
        numbered = [
            dataclasses.replace(group, group=id) for group, (id, _) in zip(sampled, share, strict=True)
        ]
        return self.graded.grade(numbered, step, seconds)

    def _add_extra_samples(
        self,
        source: SampleSource,
        groups: Sequence[ScoredGroup],
        step: int,
        version: int,
        seconds: dict[str, float],
    ) -> list[ScoredGroup]:
        """``groups`` with the graded completions of ``source`` appended."""
        share = self.graded.process.share(list(source.choose(groups)))
        with add_time(seconds, "rollout"):
            sampled = source.sample(share, stable_hash(self.sampling.seed, "arm", source.code, step), version)
        added = {group.group: group for group in self.graded.grade(sampled, step, seconds)}
        return [
            _join_groups(group, added[group.group]) if group.group in added else group for group in groups
        ]


@contextlib.contextmanager
def add_time(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the wall-clock time of the ``with`` block to ``seconds[phase]``."""
    start = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - start


def _join_groups(group: ScoredGroup, added: ScoredGroup) -> ScoredGroup:
    completions = group.completions + added.completions
    return dataclasses.replace(group, completions=completions, scores=group.scores + added.scores)
