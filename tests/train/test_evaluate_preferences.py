"""Held-out accuracy and margin, by hand, on log-probs that a ten-line learner makes up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.data.labels import LabelledCompletion
from rltrain.data.preferences import Pair
from rltrain.errors import UserError
from rltrain.learner.row_scoring import log_prob_inputs
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.report.statistics import clustered_average
from rltrain.train.evaluate_preferences import PreferenceEvaluator
from rltrain.train.examples import (
    ExampleOrder,
    Mismatches,
    examples_of_labels,
    examples_of_pairs,
    group_by_prompt,
    mismatched_rows,
    prompt_ids,
)
from rltrain.types.policy import TokenRows


class Oracle:
    """Log-probs by completion token; each token's entropy is a tenth of its id."""

    def __init__(self, **logps: float) -> None:
        self.logps = {int(name[1:]): value for name, value in logps.items()}

    def log_probs(self, rows: TokenRows, *, sides: int) -> Tensor:
        return torch.tensor(
            [sum(self.logps[token] for token in completion) for completion in rows.completions]
        )

    def log_probs_and_entropy(self, rows: TokenRows, *, sides: int) -> tuple[Tensor, Tensor | None]:
        return self.log_probs(rows, sides=sides), torch.tensor(
            [sum(completion) / 10 for completion in rows.completions]
        )

    def loss_inputs(self, numbers: Tensor, sides: int) -> Any:
        return log_prob_inputs(numbers, sides)


def evaluator(learner: Any, examples: Any, loss: str, paired: bool = False) -> PreferenceEvaluator:
    return PreferenceEvaluator(learner, examples, PreferenceObjective(PREFERENCE_LOSSES.bind(loss)), paired)


def test_pairs_are_won_lost_or_tied() -> None:
    pairs = [
        Pair("a", (1,), (5,), (6,)),
        Pair("b", (2,), (6,), (5,)),
        Pair("c", (3,), (5,), (7,)),
        Pair("d", (3,), (5,), (6,)),
    ]
    # log-ratios 5: +1, 6: -1, 7: +1 (reference 0); margins +2, -2, 0, +2; beta 0.1
    examples = examples_of_pairs(pairs, {"ref_logp": torch.zeros(8)})
    metrics = evaluator(Oracle(t5=1.0, t6=-1.0, t7=1.0), examples, "dpo").evaluate().metrics()
    assert metrics["eval/accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert metrics["eval/margin"] == pytest.approx(0.1 * (2 - 2 + 0 + 2) / 4)
    losses = [math.log1p(math.exp(-0.1 * margin)) for margin in (2, -2, 0, 2)]
    assert metrics["eval/loss"] == pytest.approx(sum(losses) / 4)
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]
    assert metrics["eval/examples"] == 4


def test_calibration_is_held_against_the_datas_degree_of_preference() -> None:
    # Log-ratios 5: ln 9, 6: 0 (beta 1): the policy gives the first pair 0.9 and the second 0.1.
    facts = {"ref_logp": torch.zeros(4)}
    oracle, loss = (
        Oracle(t5=math.log(9), t6=0.0),
        PreferenceObjective(PREFERENCE_LOSSES.bind("dpo", {"beta": 1.0})),
    )
    plain = examples_of_pairs([Pair("a", (1,), (5,), (6,)), Pair("b", (2,), (6,), (5,))], facts)
    metrics = PreferenceEvaluator(oracle, plain, loss).evaluate().metrics()  # type: ignore[arg-type]
    # against certainty: 0.1^2 and 0.9^2; one bin of confidence 0.9, of which one half is right
    assert (metrics["eval/brier"], metrics["eval/ece"]) == (
        pytest.approx((0.01 + 0.81) / 2),
        pytest.approx(0.4),
    )
    stated = examples_of_pairs(
        [Pair("a", (1,), (5,), (6,), p_chosen=0.6), Pair("b", (2,), (6,), (5,), p_chosen=0.7)], facts
    )
    metrics = PreferenceEvaluator(oracle, stated, loss).evaluate().metrics()  # type: ignore[arg-type]
    # 0.9 against 0.6 and, turned round, 0.9 against 1 - 0.7
    assert (metrics["eval/brier"], metrics["eval/ece"]) == (
        pytest.approx((0.09 + 0.36) / 2),
        pytest.approx(0.9 - (0.6 + 0.3) / 2),
    )
    graded = examples_of_pairs(
        [Pair("a", (1,), (5,), (6,), margin=2.0), Pair("b", (2,), (5,), (6,), margin=2.0)], facts
    )
    metrics = PreferenceEvaluator(oracle, graded, loss, gamma=math.log(9) / 2).evaluate().metrics()  # type: ignore[arg-type]
    # sigmoid(gamma 2) is 0.9, which is what the policy says
    assert (metrics["eval/brier"], metrics["eval/ece"]) == (
        pytest.approx(0.0, abs=1e-6),
        pytest.approx(0.0, abs=1e-6),
    )
    assert metrics["eval/brier_low"] <= metrics["eval/brier"] <= metrics["eval/brier_high"]


def test_a_policy_that_prefers_neither_side_is_judged_by_the_degree_alone() -> None:
    examples = examples_of_pairs(
        [Pair("a", (1,), (5,), (6,)), Pair("b", (2,), (6,), (5,))], {"ref_logp": torch.zeros(4)}
    )
    metrics = evaluator(Oracle(t5=0.0, t6=0.0), examples, "dpo").evaluate().metrics()
    assert (metrics["eval/accuracy"], metrics["eval/brier"], metrics["eval/ece"]) == (0.5, 0.25, 0.0)


def test_calibration_by_margins_needs_margins() -> None:
    plain = examples_of_pairs([Pair("a", (1,), (5,), (6,))], {"ref_logp": torch.zeros(2)})
    with pytest.raises(UserError, match=r"eval\.gamma is 0\.7, but the held-out examples have no margins"):
        PreferenceEvaluator(
            Oracle(t5=0.0), plain, PreferenceObjective(PREFERENCE_LOSSES.bind("dpo")), gamma=0.7
        )  # type: ignore[arg-type]


def test_entropy_is_a_mean_over_the_tokens_of_the_better_completions() -> None:
    # chosen (5, 5, 5) and (7,): entropies 1.5 and 0.7 over four tokens; the rejected 9s do not count
    pairs = [Pair("a", (1,), (5, 5, 5), (9,)), Pair("b", (2,), (7,), (9, 9))]
    oracle = Oracle(t5=-1.0, t7=-1.0, t9=-1.0)
    metrics = (
        evaluator(oracle, examples_of_pairs(pairs, {"ref_logp": torch.zeros(4)}), "dpo").evaluate().metrics()
    )
    assert metrics["eval/entropy"] == pytest.approx((1.5 + 0.7) / 4)
    # the same completions one by one
    rows = [("a", (5, 5, 5), 1.0), ("a", (9,), 0.0), ("b", (7,), 1.0), ("b", (9, 9), 0.0)]
    completions = [LabelledCompletion(name, (ord(name),), tokens, label) for name, tokens, label in rows]
    examples = examples_of_labels(completions, {"ref_logp": torch.zeros(4)}, Mismatches(0, torch.zeros(4)))
    assert evaluator(oracle, examples, "kto").evaluate().metrics()["eval/entropy"] == pytest.approx(
        (1.5 + 0.7) / 4
    )


def test_labelled_sides_of_pairs_are_compared_with_each_other_and_others_with_all() -> None:
    rows = [(1, 5, 1.0), (1, 6, 0.0), (2, 8, 1.0), (2, 7, 0.0)]
    completions = [
        LabelledCompletion(str(index), (prompt,), (token,), label)
        for index, (prompt, token, label) in enumerate(rows)
    ]
    others = Mismatches(0, torch.zeros(4))
    examples = examples_of_labels(completions, {"ref_logp": torch.zeros(4)}, others)
    oracle = Oracle(t5=3.0, t6=0.0, t7=2.0, t8=1.0)
    paired = evaluator(oracle, examples, "kto", paired=True).evaluate().metrics()
    # 3 against 0 and 1 against 2
    assert (paired["eval/accuracy"], paired["eval/margin"]) == (0.5, pytest.approx((3 - 1) / 2))
    unpaired = evaluator(oracle, examples, "kto").evaluate().metrics()
    # 3 beats 0 and 2; 1 beats 0 and loses to 2
    assert (unpaired["eval/accuracy"], unpaired["eval/margin"]) == (0.75, pytest.approx((3 + 1 + 1 - 1) / 4))


def test_an_interval_is_over_prompts_not_over_their_examples() -> None:
    # Two prompts with fifty equal examples each are two draws, not a hundred: the interval reaches from 0 to
    # 1.
    estimate = clustered_average([1.0] * 50 + [0.0] * 50, [0] * 50 + [1] * 50, seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.prompts) == (0.5, 0.0, 1.0, 2)
    many = clustered_average([1.0, 0.0] * 50, range(100), seed=0)
    assert 0.35 < many.low < 0.45 < 0.55 < many.high < 0.65
    # A draw's mean is its sum over its count: three examples of one prompt weigh three times one of another.
    assert clustered_average([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1], seed=0).value == 0.75
    assert math.isnan(clustered_average([1.0], [0], seed=0).low)


def test_no_prompt_gets_a_completion_of_its_own_and_a_step_draws_anew() -> None:
    prompts = [(1,), (1,), (2,), (2,), (3,), (4,)]
    rows, ids = TokenRows(tuple(prompts), tuple((10 + index,) for index in range(6))), prompt_ids(prompts)
    drawn = [mismatched_rows(rows, ids, seed=0, step=step) for step in range(20)]
    for others in drawn:
        assert others.prompts == rows.prompts and sorted(others.completions) == sorted(rows.completions)
        for index, completion in enumerate(others.completions):
            assert prompts[completion[0] - 10] != prompts[index]
    assert len({others.completions for others in drawn}) > 1
    assert drawn[3] == mismatched_rows(rows, ids, seed=0, step=3)


def test_an_order_keeps_the_completions_of_a_prompt_together() -> None:
    ids = prompt_ids([(1,), (2,), (1,), (2,), (3,), (3,)])
    assert group_by_prompt(ids) == [[0, 2], [1, 3], [4, 5]]
    order = ExampleOrder(group_by_prompt(ids), 4, seed=0)
    assert {frozenset(order.next()) for _ in range(6)} <= {
        frozenset(s) for s in ({0, 2, 1, 3}, {0, 2, 4, 5}, {1, 3, 4, 5})
    }
    with pytest.raises(UserError, match="prompts have 1, 2 of them"):
        ExampleOrder([[0], [1, 2]], 2, seed=0)
    with pytest.raises(UserError, match=r"train\.examples is 3"):
        ExampleOrder(group_by_prompt(ids), 3, seed=0)
