"""Rewards of 0 and 1 by the only function say what is correct; anything else is named in the reason
for no pass@k.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from rltrain.config.schema import RewardRef
from rltrain.errors import UserError
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.score_checks import ContractError
from rltrain.rollout.colocated import GradedSampler
from rltrain.rollout.grading import reward_inputs, sample_inputs, score_groups
from rltrain.rollout.verdicts import add_verdicts, label_of_only_function
from rltrain.train.evaluate import Evaluator
from rltrain.types.samples import (
    REFERENCE_VERSION,
    Completion,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Span,
)
from support.samplers import EchoSampler

REFS = [RewardRef(name="mine.py:judge")]


def completion(version: int = 7) -> Completion:
    return Completion((1, 2), (-1.0, -1.0), "stop", "x", (Span(0, 2, version),))


class Fixed:
    """Gives the completions of prompt k the k-th row of values."""

    def __init__(self, rows: Sequence[Sequence[float | None]], weight: float = 1.0, **parts: float) -> None:
        self.rows, self.weight, self.parts = rows, weight, parts
        self.occasions: list[str] = []

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        self.occasions += [inputs.occasion for inputs in groups]
        return [[self._score(value) for value in self.rows[int(inputs.prompt)]] for inputs in groups]

    def _score(self, value: float | None) -> Score:
        if value is None:
            return Score(0.0, ungraded="none")
        return Score(self.weight * value, {"judge": value, **self.parts})


def evaluate(grader: Fixed, label: str | None, k: tuple[int, ...] = (1, 2)) -> Any:
    prompts = [Prompt(str(index), (1,), str(index)) for index in range(len(grader.rows))]
    sampling = Sampling(n=len(grader.rows[0]), temperature=1.0, max_tokens=4, seed=0)
    source = GradedSampler(EchoSampler(), grader, verdict_of=label)
    return Evaluator(prompts, sampling, k, verdict_of=label).evaluate(source, 5)


def test_rewards_of_zero_and_one_give_pass_at_k_whatever_their_weight() -> None:
    grader = Fixed([[1.0, 0.0], [0.0, None], [1.0, 1.0]], weight=2.0)
    result = evaluate(grader, "judge")
    # right of two: 1, 0 (one of them ungraded), 2
    assert [estimate.value for estimate in result.results] == [
        0.5,
        pytest.approx(2 / 3),
    ] and result.note == ""
    assert grader.occasions == ["held-out prompts after 5 updates"] * 3


@pytest.mark.parametrize(
    ("rows", "label", "said"),
    [
        (
            [[1.0, 0.0], [0.0, 0.35]],
            "judge",
            r"no pass@k: judge does not say which .* are correct.*\(for example 0\.35\); return Score",
        ),
        ([[1.0, -1.0]], "judge", r"for example -1"),
        ([[1.0, 0.0]], None, "the rewards do not say of every completion whether it is correct"),
    ],
)
def test_other_rewards_give_no_pass_at_k_and_a_line_that_says_why(rows, label, said) -> None:
    result = evaluate(Fixed(rows), label)
    assert result.results == ()
    assert re.search(said, result.note)
    assert evaluate(Fixed(rows), label, k=()).note == ""


def test_a_function_with_verdicts_of_its_own_keeps_them() -> None:
    result = evaluate(Fixed([[1.0, 1.0]], correct=0.0), "judge", k=(1,))
    assert [estimate.value for estimate in result.results] == [0.0]


def test_one_value_that_is_neither_leaves_every_group_of_the_step_without_verdicts() -> None:
    def group(*values: float) -> ScoredGroup:
        return ScoredGroup(
            0,
            Prompt("a", (1,), "a"),
            (completion(),) * len(values),
            tuple(Score(v, {"judge": v}) for v in values),
        )

    judged = add_verdicts([group(1.0, 0.0), group(0.0, 0.0)], "judge")
    assert [[score.correct for score in group.scores] for group in judged] == [[True, False], [False, False]]
    mixed = add_verdicts([group(1.0, 0.0), group(0.0, 0.5)], "judge")
    assert {score.correct for group in mixed for score in group.scores} == {None}


def test_only_a_single_function_of_the_users_can_say_so() -> None:
    assert label_of_only_function(REFS) == "judge"
    assert label_of_only_function([*REFS, RewardRef(name="length")]) is None
    assert label_of_only_function([RewardRef(name="empo")]) is None


def test_a_function_that_breaks_its_contract_is_the_users_mistake() -> None:
    class Broken:
        def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
            raise ContractError("judge returned 1 scores for 2 completions")

    with pytest.raises(UserError, match=r"reward\.functions: judge returned 1 scores"):
        score_groups([RolloutGroup(0, Prompt("a", (1,), "a"), (completion(),) * 2)], Broken())


def test_what_graders_get_says_how_far_the_policy_is_and_what_the_prompt_was() -> None:
    messages = ({"role": "user", "content": "a"},)
    prompt = Prompt("a", (5, 6), "a", {"answer": "1"}, messages)
    inputs = reward_inputs(RolloutGroup(0, prompt, (completion(7), completion(REFERENCE_VERSION))), "step 3")
    assert (inputs.updates, inputs.occasion, inputs.messages) == (7, "step 3", messages)
    assert reward_inputs(RolloutGroup(0, prompt, (completion(REFERENCE_VERSION),))).updates == 0
    sample = sample_inputs(prompt, in_environment=True)
    assert len(sample.completions) == len(sample.episodes) == len(sample.completion_ids) == 2
    assert sample.messages == messages
