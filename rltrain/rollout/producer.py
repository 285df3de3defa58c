"""Prompts to scored groups: sampling, grading, and DAPO's dynamic sampling with bounded effort."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from reward.resolve import ContractError
from reward.score import Episode, RewardInputs
from rltrain.advantage.group import informative_groups
from rltrain.advantage.process import within_accuracy
from rltrain.errors import UserError
from rltrain.protocols import RolloutEngine
from rltrain.rollout.arms import Arm
from rltrain.rollout.temperature import TemperatureController
from rltrain.rollout.verdicts import with_verdicts
from rltrain.seeds import stable_hash
from rltrain.types import Completion, Prompt, RolloutGroup, Sampling, Score, ScoredGroup


class Grader(Protocol):
    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]: ...


class Order(Protocol):
    def next(self) -> list[int]: ...

    def observe(self, metrics: Mapping[str, float]) -> None: ...

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
    notes: dict[str, float] = field(default_factory=dict)  # what arms and the temperature say of the step, as notes on its batch


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
    arms: Sequence[Arm] = ()  # beside the policy's own; they add rows to the groups the step trains on
    keep: Callable[[ScoredGroup], bool] | None = None  # which groups dynamic sampling does not replace; None: ``informative`` ones
    temperature: TemperatureController | None = None  # adapts the policy's own arm token by token; None: all at ``sampling.temperature``
    verdict_of: str | None = None  # the only reward, a user's function: rewards of 0 and 1 then say what is correct

    def next(self, step: int, version: int) -> Produced:
        kept: list[ScoredGroup] = []
        drawn: list[ScoredGroup] = []
        seconds = {"rollout": 0.0, "reward": 0.0}
        rounds = 0
        while len(kept) < self.wanted and rounds < self.max_rounds:
            fresh = self._one_round(step, rounds, len(drawn), version, seconds)
            drawn += fresh
            kept += [group for group in fresh if self.max_rounds == 1 or (self.keep or informative)(group)]
            rounds += 1
        groups = kept[: self.wanted] or drawn[: self.wanted]  # nothing informative: the step line will say why nothing moved
        counts = tuple(sum(right) for group in drawn if (right := correctness(group)) is not None)
        notes = {} if self.temperature is None else self.temperature.notes()
        for arm in self.arms:
            groups = self._with_arm(arm, groups, step, version, seconds)
            notes |= arm.notes()
        return Produced(tuple(groups), len(drawn), rounds, counts, seconds, notes)

    def observe(self, entropy: float) -> None:
        """Tell the arms how the step went. entropy: nats, the policy's, mean over the tokens that its own arm sampled."""
        for arm in self.arms:
            arm.observe(entropy)

    def arms_state(self) -> list[dict[str, Any]]:
        return [arm.state_dict() for arm in self.arms]

    def load_arms_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        for arm, state in zip(self.arms, states, strict=True):
            arm.load_state_dict(state)

    def _one_round(self, step: int, number: int, first_id: int, version: int, seconds: dict[str, float]) -> list[ScoredGroup]:
        chosen = list(enumerate(self.order.next(), start=first_id))[self.rank :: self.ranks]
        sampling = dataclasses.replace(self.sampling, seed=stable_hash(self.sampling.seed, "rollout", step, number))
        if self.temperature is not None:
            sampling = self.temperature.sampling(sampling)
        with _timed(seconds, "rollout"):
            sampled = self.engine.generate([self.prompts[index] for _, index in chosen], sampling, version)
        numbered = [dataclasses.replace(group, group=number) for group, (number, _) in zip(sampled, chosen, strict=True)]
        return self._graded(numbered, step, seconds)

    def _with_arm(self, arm: Arm, groups: Sequence[ScoredGroup], step: int, version: int, seconds: dict[str, float]) -> list[ScoredGroup]:
        """``groups`` with the completions that ``arm`` adds, graded, after those that are there."""
        mine = list(arm.choose(groups))[self.rank :: self.ranks]
        with _timed(seconds, "rollout"):
            sampled = arm.sample(mine, stable_hash(self.sampling.seed, "arm", arm.code, step), version)
        added = {group.group: group for group in self._graded(sampled, step, seconds)}
        return [_joined(group, added[group.group]) if group.group in added else group for group in groups]

    def _graded(self, groups: Sequence[RolloutGroup], step: int, seconds: dict[str, float]) -> list[ScoredGroup]:
        """This rank's ``groups`` graded, with those of the other ranks, in the order of their ids."""
        with _timed(seconds, "reward"):
            scored = score_groups(groups, self.grader, f"step {step}")
        return with_verdicts(sorted(self.gather(scored), key=lambda group: group.group), self.verdict_of)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - started


def _joined(group: ScoredGroup, more: ScoredGroup) -> ScoredGroup:
    return dataclasses.replace(group, completions=group.completions + more.completions, scores=group.scores + more.scores)


def score_groups(groups: Sequence[RolloutGroup], grader: Grader, occasion: str = "") -> list[ScoredGroup]:
    """Grade every completion of every group; a completion that cannot be graded says so in its score, as does one whose episode failed.

    occasion: what they are graded for, in words. Raises UserError where a function does not return a score per completion.
    """
    try:
        graded = grader.score([reward_inputs(group, occasion) for group in groups])
    except ContractError as error:
        raise UserError(f"reward.functions: {error}") from error
    scored: list[ScoredGroup] = []
    for group, scores in zip(groups, graded, strict=True):
        judged = tuple(_unless_failed(completion, score) for completion, score in zip(group.completions, scores, strict=True))
        scored.append(ScoredGroup(group.group, group.prompt, group.completions, judged))
    return scored


def _unless_failed(completion: Completion, score: Score) -> Score:
    failure = None if completion.episode is None else completion.episode.failure
    return score if failure is None else Score(0.0, ungraded=failure)


def reward_inputs(group: RolloutGroup | ScoredGroup, occasion: str = "") -> RewardInputs:
    """What graders get to read: the text of each completion, or of an episode its last turn."""
    episodes = tuple(completion.episode for completion in group.completions if completion.episode is not None)
    return RewardInputs(
        prompt=group.prompt.text,
        completions=tuple(_answer(completion) for completion in group.completions),
        token_counts=tuple(len(completion.token_ids) for completion in group.completions),
        finish=tuple(completion.finish for completion in group.completions),
        columns=dict(group.prompt.columns),
        episodes=episodes if len(episodes) == len(group.completions) else (),
        prompt_ids=tuple(group.prompt.token_ids),
        completion_ids=tuple(tuple(completion.token_ids) for completion in group.completions),
        messages=group.prompt.messages,
        updates=max([0, *(completion.version for completion in group.completions)]),  # the reference model has taken none
        occasion=occasion,
    )


def _answer(completion: Completion) -> str:
    if completion.episode is None:
        return completion.text
    return completion.episode.turns[-1] if completion.episode.turns else ""


def sample_inputs(prompt: Prompt, *, in_environment: bool = False) -> RewardInputs:
    """What a reward function would get for two empty-handed answers: enough to find out whether it runs, and how many scores it gives."""
    completions = ("0", "1")
    return RewardInputs(
        prompt.text,
        completions,
        token_counts=(1, 1),
        finish=("stop", "stop"),
        columns=dict(prompt.columns),
        episodes=tuple(Episode(0.0, {}, (text,)) for text in completions) if in_environment else (),
        completion_ids=((prompt.token_ids[-1],),) * 2,  # any tokens that the policy knows
        messages=prompt.messages,
        occasion="the check before training",
    )


def correctness(group: ScoredGroup) -> list[bool] | None:
    """Raw correctness per graded completion, whatever penalties the reward adds; None if no reward function reports it."""
    graded = [score for score in group.scores if score.ungraded is None]
    if any(score.correct is None for score in graded):
        return None
    return [bool(score.correct) for score in graded]


def within(low: float, high: float, group: ScoredGroup) -> bool:
    """PRIME (arXiv:2502.01456): the share of right ones among the graded completions lies in [low, high]. Rewards stand in for
    verdicts where nothing reports correctness."""
    values = correctness(group) or [score.value for score in group.scores if score.ungraded is None]
    verdicts = torch.tensor(values, dtype=torch.float64)
    return bool(within_accuracy(verdicts, torch.zeros(len(values), dtype=torch.int64), low=low, high=high).any())


def informative(group: ScoredGroup) -> bool:
    """DAPO (arXiv:2503.14476): 0 < number correct < number graded. Where nothing reports correctness, rewards that differ."""
    values = correctness(group) or [score.value for score in group.scores if score.ungraded is None]
    return bool(informative_groups(torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.int64)).any())
