"""PACED as a whole: the loss of a stage is the mean, over its own rows, of the pass-rate weight times the
row's token mean.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.errors import RecipeError
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY

ROOT = Path(__file__).parents[2]
# Two prompts, three samples and the teacher's text each; prompt 0 is right once in two graded samples, prompt
# 1 twice in three.
SOURCES = [SOURCE_POLICY, SOURCE_POLICY, SOURCE_POLICY, SOURCE_DATASET] * 2
CORRECT = [1, 0, math.nan, 1, 1, 1, 0, 1]


def batch_of(correct: list[float] | None = None) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor(
        [[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]],
        dtype=torch.bool,
    )
    zeros = torch.zeros(8, 3, dtype=torch.float64)
    return TrainBatch(
        mask=mask,
        advantages=zeros,
        weights=zeros + 1,
        rewards=torch.zeros(8),
        group=torch.tensor([4] * 4 + [9] * 4),
        source=torch.tensor(SOURCES),
        version=torch.zeros(8, dtype=torch.int64),
        teacher_logp=-torch.rand(8, 3, generator=generator, dtype=torch.float64),
        correct=torch.tensor(correct or CORRECT),
    )


def loss(batch: TrainBatch, policy: PolicyTokens, forward: float, reverse: float) -> torch.Tensor:
    bound = [("teacher_text", forward), ("kdrl", reverse)]
    terms = tuple(Term(name, LOSS_TERMS.bind(name, {}), coefficient) for name, coefficient in bound)
    objective = Objective(
        POLICY_LOSSES.bind("reinforce", {}), terms, AGGREGATES.bind("seq_mean_token_mean", {})
    )
    return objective(policy, batch, StepTotals(*batch.totals_of_mask, max_tokens=3)).loss


def test_each_stage_is_the_weighted_mean_over_its_own_rows() -> None:
    batch = batch_of()
    policy = PolicyTokens(-torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    # p = 1/2 and 2/3: weights 1/4 and 2/9, of mean 17/72: 18/17 and 16/17
    weight = torch.tensor([18 / 17] * 4 + [16 / 17] * 4, dtype=torch.float64)
    marked = TOKEN_CONTROLS.bind("paced", {})(batch)
    assert batch.teacher_logp is not None
    d = batch.teacher_logp - policy.logp
    means = {
        name: (values * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
        for name, values in (("forward", d), ("reverse", d.square() / 2))
    }
    # row 2 could not be graded and is masked out
    teacher = [3, 7]
    student = [0, 1, 4, 5, 6]
    torch.testing.assert_close(loss(marked, policy, 1.0, 0.0), (weight * means["forward"])[teacher].mean())
    torch.testing.assert_close(loss(marked, policy, 0.0, 1.0), (weight * means["reverse"])[student].mean())
    assert marked.notes["paced_pass_rate"] == pytest.approx(7 / 12)


def test_prompts_that_are_always_or_never_right_weigh_nothing() -> None:
    always = TOKEN_CONTROLS.bind("paced", {})(batch_of([1, 1, 1, 1, 0, 0, 0, 1]))
    assert (
        not any(bool(mark.any()) for mark in always.extra.values()) and always.notes["paced_weightless"] == 1
    )
    unknown = TOKEN_CONTROLS.bind("paced", {})(batch_of([math.nan, math.nan, math.nan, 1, 1, 0, 0, 1]))
    assert not unknown.extra["kdrl"][:4].any() and bool(unknown.extra["kdrl"][4:7].any())
    # c + 1/2 over K + 1, 3.5/4 and .5/4: equal weights, of mean 1, on the six of eight rows of the policy
    smooth = TOKEN_CONTROLS.bind("paced", {"smooth": True})(batch_of([1, 1, 1, 1, 0, 0, 0, 1]))
    assert smooth.extra["kdrl"][0, 0] == pytest.approx(7 / 5)  # 7 rows with tokens, 5 of them the policy's
    with pytest.raises(ValueError, match="which completions are correct"):
        TOKEN_CONTROLS.bind("paced", {})(batch_of().replace(correct=None))


def test_the_stages_of_a_run_follow_one_another() -> None:
    first, second = (
        COEFFICIENTS.bind("stage", {"begin": begin, "end": end})(total_steps=5)
        for begin, end in ((0.0, 0.5), (0.5, 1.0))
    )
    coefficients = []
    for _ in range(5):
        coefficients.append((first(), second()))
        for coefficient in (first, second):
            coefficient.observe({})
    # the third of 5 steps begins before half of them is over
    assert coefficients == [(1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
    with pytest.raises(ValueError, match=r"train\.steps is 6"):
        COEFFICIENTS.bind("stage", {})(total_steps=6).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.extra_samples=[]", "add answer to rollout.extra_samples"),
        ("loss.aggregate=token_mean", "exact under seq_mean_token_mean only"),
        ("loss.terms=[{name: kdrl, coefficient: 1.0}]", "marks tokens for the term teacher_text"),
        ("control=[]", "adds rows that only an advantage which distinguishes sources can use"),
    ],
)
def test_half_of_paced_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(load_recipe(ROOT / "recipes/policy/paced.yaml", overrides=[override]))
