"""What the online loop makes of rows that are not the policy's own: uncorrected, left out of
statistics, dropped where only graded.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rltrain.advantage import ADVANTAGES
from rltrain.advantage.stage import compute_advantages
from rltrain.control import TOKEN_CONTROLS
from rltrain.report.metrics import check_names, completion_metrics, own_step_metrics, source_metrics
from rltrain.reward.score import Score
from rltrain.rollout.collate import collate
from rltrain.rollout.source import Rollouts
from rltrain.train.online import Step, disable_importance_correction, drop_reference_rows
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import (
    SOURCE_DATASET,
    SOURCE_POLICY,
    SOURCE_REFERENCE,
    SOURCE_TEMPERED,
    Completion,
    Prompt,
    ScoredGroup,
    Span,
)


def row(source: int, length: int, logp: float = -1.0) -> Completion:
    return Completion((5,) * length, (logp,) * length, "stop", "x", (Span(0, length, 3),), source)


def step(*sources: int) -> tuple[list[ScoredGroup], TokenRows, TrainBatch]:
    """Two groups of two policy rows (rewards 1, 0 and 0, 0; 3 tokens) and one row of each of ``sources``
    (reward 9; 5 tokens).
    """
    groups = []
    for group, rewards in enumerate(([1.0, 0.0], [0.0, 0.0])):
        completions = (
            *(row(SOURCE_POLICY, 3) for _ in rewards),
            *(row(source, 5, -7.0) for source in sources),
        )
        scores = (
            *(Score(value, {"correct": value}) for value in rewards),
            *(Score(9.0, {"correct": 1.0}) for _ in sources),
        )
        groups.append(ScoredGroup(group, Prompt(str(group), (1, 2), ""), completions, scores))
    rows, batch = collate(groups)
    return groups, rows, batch


def test_only_rows_of_the_policy_are_corrected_for_how_they_were_sampled() -> None:
    _, _, batch = step(SOURCE_TEMPERED, SOURCE_DATASET)
    old = torch.full(batch.mask.shape, -2.0)
    batch = disable_importance_correction(batch.replace(old_logp=old))
    weights = TOKEN_CONTROLS.bind("tis", {"cap": 100.0})(batch).weights
    policy = batch.source == SOURCE_POLICY
    # exp(-2 - -1) for the policy's rows; for the others, sampled at -7 and written by nobody, exactly 1
    # instead of e^5
    torch.testing.assert_close(weights[policy][batch.mask[policy]], torch.full((12,), math.exp(-1.0)))
    assert (weights[~policy][batch.mask[~policy]] == 1).all()


def test_without_old_log_probs_nothing_is_replaced() -> None:
    _, _, batch = step(SOURCE_TEMPERED)
    assert disable_importance_correction(batch) is batch


def test_reference_rows_are_gone_after_the_advantages_and_take_their_padding_along() -> None:
    _, rows, batch = step(SOURCE_REFERENCE)
    assert batch.mask.shape == (6, 5)
    weighted = batch.replace(weights=batch.weights * 2)
    complete = Step(1, Rollouts((), 0, 1, (), {}), rows, batch, weighted, {})
    dropped = drop_reference_rows(complete)
    kept_rows, sampled, kept = dropped.rows, dropped.sampled, dropped.batch
    assert kept_rows.completions == ((5, 5, 5),) * 4
    assert kept.mask.shape == sampled.mask.shape == (4, 3)
    assert kept.group.tolist() == [0, 0, 1, 1]
    assert float(kept.weights.mean()) == 2 and float(sampled.weights.mean()) == 1


def test_without_reference_rows_nothing_is_dropped() -> None:
    _, rows, batch = step(SOURCE_TEMPERED)
    complete = Step(1, Rollouts((), 0, 1, (), {}), rows, batch, batch, {})
    assert drop_reference_rows(complete) is complete


@pytest.mark.parametrize(
    "sources",
    [
        (SOURCE_TEMPERED,),
        (SOURCE_REFERENCE,),
        (SOURCE_DATASET,),
        (SOURCE_TEMPERED, SOURCE_REFERENCE, SOURCE_DATASET),
    ],
)
def test_the_numbers_of_a_step_are_those_of_the_policys_own_rows(sources: tuple[int, ...]) -> None:
    def numbers(*sources: int) -> dict[str, float]:
        groups, _, batch = step(*sources)
        foreign = (batch.source != SOURCE_POLICY)[:, None].expand(batch.mask.shape)
        logp = torch.where(foreign, -50.0, torch.full(batch.mask.shape, -1.0))
        entropy = torch.where(foreign, 30.0, torch.full(batch.mask.shape, 0.25))
        metrics = completion_metrics(groups) | own_step_metrics(batch, logp, entropy, batch.mask)
        del metrics["learner/tokens"]  # of everything that trains
        return metrics

    assert numbers(*sources) == numbers()


def test_tokens_that_train_are_counted_whatever_their_source() -> None:
    _, _, batch = step(SOURCE_TEMPERED, SOURCE_REFERENCE)
    zeros = torch.zeros(batch.mask.shape)
    assert (
        own_step_metrics(batch, zeros, zeros, batch.mask)["learner/tokens"] == 4 * 3 + 2 * 5
    )  # not the reference's


def test_sources_are_counted_by_name() -> None:
    groups, _, _ = step(SOURCE_TEMPERED, SOURCE_DATASET)
    metrics = source_metrics(groups)
    tempered = {"completions": 2, "tokens": 10, "reward": 9, "correct": 1}
    assert metrics == {
        f"rollout/source_{source}_{key}": value
        for source in ("tempered", "answer")
        for key, value in tempered.items()
    }
    check_names(metrics)
    assert source_metrics(step()[0]) == {}


@pytest.mark.parametrize(
    ("advantage", "hp"),
    [
        ("group_norm", {}),
        ("group_norm", {"scale": "batch"}),
        ("rloo", {}),
        ("reinforce_pp", {}),
        ("hapo", {}),
    ],
)
def test_rows_of_another_source_do_not_move_the_policys_advantages(
    advantage: str, hp: dict[str, Any]
) -> None:
    # neither over the group nor over the step, whose tokens reinforce_pp whitens together
    estimator = ADVANTAGES.bind(advantage, hp)
    separate = compute_advantages(step()[2], estimator)
    for sources in ((SOURCE_TEMPERED,) * 2, (SOURCE_TEMPERED,) * 2 + (SOURCE_DATASET,) * 2):
        together = compute_advantages(step(*sources)[2], estimator)
        policy_advantages = together.advantages[together.source == SOURCE_POLICY][:, :3]
        torch.testing.assert_close(policy_advantages, separate.advantages, rtol=0, atol=0)
