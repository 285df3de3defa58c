"""What graders read from a group, and what their scores say about it. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rltrain.errors import UserError
from rltrain.reward.score import Episode, RewardInputs, Score
from rltrain.reward.score_checks import ContractError
from rltrain.types.samples import Completion, Prompt, RolloutGroup, ScoredGroup


class Grader(Protocol):
    """A pool of reward processes, a reward model, or both (``reward/pool.py``,
    ``rollout/model_rewards.py``).
    """

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        """A score for each completion of each group, in the same order."""
        ...


def score_groups(groups: Sequence[RolloutGroup], grader: Grader, occasion: str = "") -> list[ScoredGroup]:
    """Grades every completion of every group.

    The score of a completion that cannot be graded, or whose episode failed, says so. occasion: the purpose
    of the grading, in words. Raises UserError where a function does not return a score per completion.
    """
    try:
        graded = grader.score([reward_inputs(group, occasion) for group in groups])
    except ContractError as error:
        raise UserError(f"reward.functions: {error}") from error
    scored: list[ScoredGroup] = []
    for group, scores in zip(groups, graded, strict=True):
        checked = tuple(
            _mark_failure(completion, score)
            for completion, score in zip(group.completions, scores, strict=True)
        )
        scored.append(ScoredGroup(group.group, group.prompt, group.completions, checked))
    return scored


def _mark_failure(completion: Completion, score: Score) -> Score:
    """The score, ungraded where the completion's episode failed."""
    failure = None if completion.episode is None else completion.episode.failure
    return score if failure is None else Score(0.0, ungraded=failure)


def reward_inputs(group: RolloutGroup | ScoredGroup, occasion: str = "") -> RewardInputs:
    """What graders read of a group: the text of each completion, or the last turn of each episode."""
    episodes = tuple(completion.episode for completion in group.completions if completion.episode is not None)
    versions = [span.version for completion in group.completions for span in completion.versions]
    return RewardInputs(
        prompt=group.prompt.text,
        completions=tuple(_graded_text(completion) for completion in group.completions),
        token_counts=tuple(len(completion.token_ids) for completion in group.completions),
        finish=tuple(completion.finish for completion in group.completions),
        columns=dict(group.prompt.columns),
        episodes=episodes if len(episodes) == len(group.completions) else (),
        prompt_ids=tuple(group.prompt.token_ids),
        completion_ids=tuple(tuple(completion.token_ids) for completion in group.completions),
        messages=group.prompt.messages,
        updates=max([0, *versions]),  # 0 for the reference model
        occasion=occasion,
    )


def _graded_text(completion: Completion) -> str:
    if completion.episode is None:
        return completion.text
    return completion.episode.turns[-1] if completion.episode.turns else ""


def sample_inputs(prompt: Prompt, *, in_environment: bool = False) -> RewardInputs:
    """What a reward function would read for two arbitrary answers: enough to check that it runs and how many
    scores it returns.
    """
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
    """Whether each graded completion is correct, without the penalties that the reward adds; None if no
    reward function reports it.
    """
    graded = [score for score in group.scores if score.ungraded is None]
    if any(score.correct is None for score in graded):
        return None
    return [bool(score.correct) for score in graded]


def is_in_accuracy_range(low: float, high: float, group: ScoredGroup) -> bool:
    """PRIME (arXiv:2502.01456): the share of correct completions among the graded is within [low, high].

    Where no reward function reports correctness, the mean reward takes the place of the share. The
    arithmetic, and so every result, is that of ``advantage.process.is_accuracy_within`` on float64 tensors.
    """
    values = _verdicts(group)
    if not values:
        return False
    share = _mean(values)
    return low - 1e-9 <= share <= high + 1e-9


def is_informative(group: ScoredGroup) -> bool:
    """DAPO (arXiv:2503.14476): 0 < number correct < number graded.

    Where no reward function reports correctness: whether the rewards differ. Every result is that of
    ``advantage.group.informative_groups`` on float64 tensors.
    """
    values = _verdicts(group)
    return bool(values) and min(values) < max(values)


def _verdicts(group: ScoredGroup) -> list[float]:
    """1 for each correct and 0 for each wrong graded completion; the rewards where correctness is unknown."""
    verdicts = correctness(group)
    if verdicts is not None:
        return [float(verdict) for verdict in verdicts]
    return [score.value for score in group.scores if score.ungraded is None]


def _mean(values: Sequence[float]) -> float:
    """The mean, added up relative to the smallest value as in ``tensor_ops.segment_mean``: the mean of equal
    values is exactly that value.
    """
    low = min(values)
    total = 0.0  # a loop, because ``sum`` corrects its rounding from Python 3.12 on
    for value in values:
        total += value - low
    return low + total / len(values)
