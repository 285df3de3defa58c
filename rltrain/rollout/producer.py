"""Prompts to scored groups: sampling, grading, and DAPO's dynamic sampling with bounded effort."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from reward.score import RewardInputs
from rltrain.advantage.group import informative_groups
from rltrain.protocols import RolloutEngine
from rltrain.seeds import stable_hash
from rltrain.types import Prompt, RolloutGroup, Sampling, Score, ScoredGroup


class Grader(Protocol):
    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]: ...


class Order(Protocol):
    def next(self) -> list[int]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Produced:
    """The groups one step trains on, of all ranks, equal on every rank."""

    groups: tuple[ScoredGroup, ...]
    generated_groups: int  # before dynamic sampling dropped any
    rounds: int
    correct_counts: tuple[int, ...]  # completions right, per generated group; empty when no reward says what is correct
    seconds: dict[str, float]  # "rollout", "reward": this rank's wall-clock


@dataclass
class Producer:
    """Draws a step's prompts, samples this rank's share of them, grades it and gathers the whole.

    max_rounds: 1 trains on whatever was sampled; more replaces groups that are all right or all wrong, as long as rounds last.
    gather: concatenates the lists of all ranks.
    """

    engine: RolloutEngine
    grader: Grader
    order: Order
    prompts: Sequence[Prompt]
    sampling: Sampling  # its seed is the run's; every step and round derive their own
    wanted: int  # groups per step
    max_rounds: int
    rank: int
    ranks: int
    gather: Callable[[list[Any]], list[Any]]

    def next(self, step: int, version: int) -> Produced:
        kept: list[ScoredGroup] = []
        drawn: list[ScoredGroup] = []
        seconds = {"rollout": 0.0, "reward": 0.0}
        rounds = 0
        while len(kept) < self.wanted and rounds < self.max_rounds:
            fresh = self._one_round(step, rounds, len(drawn), version, seconds)
            drawn += fresh
            kept += [group for group in fresh if self.max_rounds == 1 or informative(group)]
            rounds += 1
        groups = kept[: self.wanted] or drawn[: self.wanted]  # nothing informative: the step line will say why nothing moved
        counts = tuple(sum(right) for group in drawn if (right := correctness(group)) is not None)
        return Produced(tuple(groups), len(drawn), rounds, counts, seconds)

    def _one_round(self, step: int, number: int, first_id: int, version: int, seconds: dict[str, float]) -> list[ScoredGroup]:
        chosen = list(enumerate(self.order.next(), start=first_id))[self.rank :: self.ranks]
        sampling = dataclasses.replace(self.sampling, seed=stable_hash(self.sampling.seed, "rollout", step, number))
        started = time.perf_counter()
        sampled = self.engine.generate([self.prompts[index] for _, index in chosen], sampling, version)
        groups = [dataclasses.replace(group, group=number) for group, (number, _) in zip(sampled, chosen, strict=True)]
        generated = time.perf_counter()
        scored = score_groups(groups, self.grader)
        seconds["rollout"] += generated - started
        seconds["reward"] += time.perf_counter() - generated
        return sorted(self.gather(scored), key=lambda group: group.group)


def score_groups(groups: Sequence[RolloutGroup], grader: Grader) -> list[ScoredGroup]:
    """Grade every completion of every group; a completion that cannot be graded says so in its score."""
    scores = grader.score([reward_inputs(group) for group in groups])
    return [ScoredGroup(g.group, g.prompt, g.completions, tuple(s)) for g, s in zip(groups, scores, strict=True)]


def reward_inputs(group: RolloutGroup) -> RewardInputs:
    return RewardInputs(
        prompt=group.prompt.text,
        completions=tuple(completion.text for completion in group.completions),
        token_counts=tuple(len(completion.token_ids) for completion in group.completions),
        finish=tuple(completion.finish for completion in group.completions),
        columns=dict(group.prompt.columns),
    )


def sample_inputs(prompt: Prompt) -> RewardInputs:
    """What a reward function would get for an empty-handed answer: enough to find out whether it runs at all."""
    return RewardInputs(prompt=prompt.text, completions=("0",), token_counts=(1,), finish=("stop",), columns=dict(prompt.columns))


def correctness(group: ScoredGroup) -> list[bool] | None:
    """Raw correctness per graded completion, whatever penalties the reward adds; None if no reward function reports it."""
    graded = [score for score in group.scores if score.ungraded is None]
    if any(score.correct is None for score in graded):
        return None
    return [bool(score.correct) for score in graded]


def informative(group: ScoredGroup) -> bool:
    """DAPO (arXiv:2503.14476): 0 < number correct < number graded. Where nothing reports correctness, rewards that differ."""
    values = correctness(group) or [score.value for score in group.scores if score.ungraded is None]
    return bool(informative_groups(torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.int64)).any())
