"""EM-FT and one-shot EM: entropies of the model's own samples, from logits to gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.learner.head import token_statistics
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch

ROWS = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)


def loss_of(name: str, logits: Tensor, advantages: float = 0.0, temperature: float = 1.0) -> Tensor:
    """The recipe's loss of one completion with a token per row of ``logits``, sampled at ``temperature``."""
    bound = POLICY_LOSSES.bind(name)
    objective = Objective(
        bound, (), AGGREGATES.bind("seq_mean_token_sum" if name == "em_ft" else "token_mean")
    )
    count = len(logits)
    statistics = token_statistics(
        logits,
        torch.eye(logits.shape[1]).double(),
        torch.zeros(count, dtype=torch.int64),
        temperature=temperature,
        wants=frozenset({"logp"} | objective.needs),
        chunk=1,
    )
    row = torch.zeros(1, dtype=torch.int64)
    batch = TrainBatch(
        mask=torch.ones(1, count),
        advantages=torch.full((1, count), advantages),
        weights=torch.ones(1, count),
        rewards=torch.zeros(1),
        group=row,
        source=row,
        version=row,
    )
    entropy = statistics.get("entropy")
    extra = {key: value[None] for key, value in statistics.items() if ":" in key}
    policy = PolicyTokens(statistics["logp"][None], None if entropy is None else entropy[None], extra)
    return objective(policy, batch, StepTotals(count, 1, count)).loss


def slope(name: str, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss_of(name, leaf), leaf)[0]


def test_em_fts_worked_example() -> None:
    assert_close(loss_of("em_ft", ROWS.log()).item(), 1.8823461791475091)
    expected = [
        [-0.3116005260232233, 0.16152387197815263, 0.15007665404507084],
        [-0.06569475789200677, -0.010746925736922918, 0.07644168362892967],
    ]
    gradient = slope("em_ft", ROWS.log())
    assert_close(gradient, torch.tensor(expected).double())
    assert gradient.sum(-1).abs().max() < 1e-15  # each row of dH/dz sums to 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_one_shot_ems_worked_example_at_any_sampling_temperature(temperature: float) -> None:
    assert_close(loss_of("one_shot_em", ROWS.log(), temperature=temperature).item(), 0.6941587107566894)


@pytest.mark.parametrize("name", ["em_ft", "one_shot_em"])
def test_uniform_and_certain_rows_are_left_where_they_are(name: str) -> None:
    assert slope(name, torch.zeros(1, 5).double()).abs().max() < 1e-15  # a stationary maximum
    assert slope(name, torch.tensor([[200.0, 0.0, 0.0]]).double()).abs().max() < 1e-30


@pytest.mark.parametrize("name", ["em_ft", "one_shot_em"])
def test_sharper_logits_are_better_and_rewards_do_not_matter(name: str) -> None:
    assert loss_of(name, 2 * ROWS.log()) < loss_of(name, ROWS.log())
    assert loss_of(name, ROWS.log(), advantages=3.0) == loss_of(name, ROWS.log())


def test_rows_without_advantage_are_trained_and_rows_without_weight_are_not() -> None:
    objective = Objective(POLICY_LOSSES.bind("em_ft"), (), AGGREGATES.bind("token_mean"))
    ids = torch.zeros(3, dtype=torch.int64)
    unit = torch.ones(3, 2)
    batch = TrainBatch(
        mask=torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
        advantages=unit * 0,
        weights=unit * torch.tensor([[1.0], [0.0], [1.0]]),
        rewards=ids.float(),
        group=ids,
        source=ids,
        version=ids,
    )
    assert objective.idle_rows(batch).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("name", "said"),
    [("em_ft", "needs policy.entropy"), ("one_shot_em", "needs the statistic 'entropy:0.5'")],
)
def test_a_missing_statistic_is_named(name: str, said: str) -> None:
    row = torch.zeros(1, dtype=torch.int64)
    unit = torch.ones(1, 1)
    batch = TrainBatch(
        mask=unit, advantages=unit, weights=unit, rewards=unit[0], group=row, source=row, version=row
    )
    with pytest.raises(ValueError, match=said):
        POLICY_LOSSES.bind(name)(PolicyTokens(unit), batch)
