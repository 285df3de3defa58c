"""What graders read of a group, and what their scores say of it. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reward.score import Episode, RewardInputs, Score
from reward.score_checks import ContractError
from rltrain.errors import UserError
from rltrain.types.samples import Completion, Prompt, RolloutGroup, ScoredGroup


class Grader(Protocol):
    """A pool of reward processes, a reward model, or both (``reward/pool.py``,
    ``rollout/model_rewards.py``).
    """

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        """One score for each completion of each group, same order."""
        ...


def score_groups(groups: Sequence[RolloutGroup], grader: Grader, occasion: str = "") -> list[ScoredGroup]:
    """Grade every completion of every group.

    A completion that cannot be graded says so in its score, as does one whose episode failed. occasion: what
    they are graded for, in words. Raises UserError where a function does not return a score per completion.
    """
    try:
        graded = grader.score([reward_inputs(group, occasion) for group in groups])
    except ContractError as error:
        raise UserError(f"reward.functions: {error}") from error
    scored: list[ScoredGroup] = []
    for group, scores in zip(groups, graded, strict=True):
        judged = tuple(
            _unless_failed(completion, score)
            for completion, score in zip(group.completions, scores, strict=True)
        )
        scored.append(ScoredGroup(group.group, group.prompt, group.completions, judged))
    return scored


def _unless_failed(completion: Completion, score: Score) -> Score:
    failure = None if completion.episode is None else completion.episode.failure
    return score if failure is None else Score(0.0, ungraded=failure)


def reward_inputs(group: RolloutGroup | ScoredGroup, occasion: str = "") -> RewardInputs:
    """What graders get to read: the text of each completion, or of an episode its last turn."""
    episodes = tuple(completion.episode for completion in group.completions if completion.episode is not None)
    versions = [span.version for completion in group.completions for span in completion.versions]
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
        updates=max([0, *versions]),  # the reference model has taken none
        occasion=occasion,
    )


def _answer(completion: Completion) -> str:
    if completion.episode is None:
        return completion.text
    return completion.episode.turns[-1] if completion.episode.turns else ""


def sample_inputs(prompt: Prompt, *, in_environment: bool = False) -> RewardInputs:
    """What a reward function would get for two arbitrary answers: enough to find out whether it runs, and how
    many scores it returns."""
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
    """Raw correctness per graded completion, whatever penalties the reward adds.

    None if no reward function reports it.
    """
    graded = [score for score in group.scores if score.ungraded is None]
    if any(score.correct is None for score in graded):
        return None
    return [bool(score.correct) for score in graded]


def in_accuracy_range(low: float, high: float, group: ScoredGroup) -> bool:
    """PRIME (arXiv:2502.01456): the share of right completions among the graded ones lies in [low, high].

    Rewards stand in for verdicts where nothing reports correctness. The arithmetic, and so every verdict, is
    that of ``advantage.process.within_accuracy`` on float64 tensors.
    """
    values = _verdicts(group)
    if not values:
        return False
    share = _mean(values)
    return low - 1e-9 <= share <= high + 1e-9


def is_informative(group: ScoredGroup) -> bool:
    """DAPO (arXiv:2503.14476): 0 < number correct < number graded.

    Rewards that differ, where nothing reports correctness. Every verdict is that of
    ``advantage.group.informative_groups`` on float64 tensors.
    """
    values = _verdicts(group)
    return bool(values) and min(values) < max(values)


def _verdicts(group: ScoredGroup) -> list[float]:
    """Of the graded completions: 1 right, 0 wrong; their rewards where nothing reports correctness."""
    right = correctness(group)
    if right is not None:
        return [float(verdict) for verdict in right]
    return [score.value for score in group.scores if score.ungraded is None]


def _mean(values: Sequence[float]) -> float:
    """From the smallest upwards, as ``tensor_ops.segment_mean``: equal values have exactly themselves as
    mean.
    """
    low = min(values)
    total = 0.0  # added one by one: ``sum`` corrects its rounding from Python 3.12 on
    for value in values:
        total += value - low
    return low + total / len(values)
