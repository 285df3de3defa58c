"""AEnt's and EPO's terms, against the ordinary bonus and the statistics they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.learner.head import token_statistics
from rltrain.loss import LOSS_TERMS
from rltrain.types.policy import PolicyTokens, TrainBatch


def batch_of(mask: Tensor) -> TrainBatch:
    zeros = torch.zeros(mask.shape)
    rows = torch.zeros(mask.shape[0], dtype=torch.int64)
    return TrainBatch(
        mask=mask,
        advantages=zeros,
        weights=zeros + 1,
        rewards=zeros[:, 0],
        group=rows,
        source=rows,
        version=rows,
    )


def through_the_head(logits: Tensor, name: str) -> Tensor:
    """The statistic ``name`` of softmax(logits), through the learner's own path: logits = hidden,
    weight the identity.
    """
    statistics = token_statistics(
        logits,
        torch.eye(logits.shape[1], dtype=logits.dtype),
        torch.zeros(len(logits), dtype=torch.int64),
        temperature=1.0,
        wants=frozenset({name}),
        chunk=2,
    )
    return statistics[name]


def test_aents_worked_example_from_logits_to_gradient() -> None:
    # z = [2, 1, 0, -1, -3], V = 5: floor(.3 x 5) = 1 token is dropped, the last, which gets no gradient
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    term = LOSS_TERMS.bind("clamped_entropy")
    assert term.needs == {"clamped_entropy:0.3"}
    entropy = through_the_head(logits, "clamped_entropy:0.3")
    batch = batch_of(torch.ones(1, 1))
    loss = term(PolicyTokens(torch.zeros(1, 1), extra={"clamped_entropy:0.3": entropy[None]}), batch)
    assert_close(loss.values.item(), -0.9475369639754255)
    assert_close(loss.metrics["nats"].item(), 0.9475369639754255)
    (slope,) = torch.autograd.grad(-loss.values.sum(), logits)
    assert_close(
        slope[0],
        torch.tensor(
            [-0.326688138929665, 0.1167009680558273, 0.130076205639984, 0.07991096517834251, 0.0]
        ).double(),
    )


def test_aent_that_drops_nothing_is_the_entropy_bonus() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(torch.ones(1, 3))
    plain = LOSS_TERMS.bind("entropy")(
        PolicyTokens(torch.zeros(1, 3), through_the_head(logits, "entropy:1.0")[None]), batch
    )
    extra = {"clamped_entropy:0.0": through_the_head(logits, "clamped_entropy:0.0")[None]}
    assert_close(
        LOSS_TERMS.bind("clamped_entropy", {"share": 0.0})(
            PolicyTokens(torch.zeros(1, 3), extra=extra), batch
        ).values,
        plain.values,
    )


def test_ties_keep_exactly_the_rest() -> None:
    # ten equal logits, three dropped: ln 7, whichever they are
    assert_close(through_the_head(torch.zeros(1, 10).double(), "clamped_entropy:0.3").item(), math.log(7))


def epo(entropy: Tensor, batch: TrainBatch, history: float | None, **hp: object) -> Tensor:
    told = {} if history is None else {"history": torch.tensor(history), "smoothing": torch.tensor(1.5)}
    return LOSS_TERMS.bind("epo", hp)(PolicyTokens(torch.zeros_like(entropy), entropy), batch, **told).values


@pytest.mark.parametrize("penalty", ["hinge", "constant"])
def test_inside_the_band_only_the_entropy_bonus_acts(penalty: str) -> None:
    entropy = torch.tensor([[0.3, 0.5, 0.7]], requires_grad=True)
    values = epo(entropy, batch_of(torch.ones(1, 3)), 0.5, kappa_low=0.5, kappa_high=1.5, penalty=penalty)
    assert_close(values, -entropy)
    assert torch.autograd.grad(values.sum(), entropy)[0].tolist() == [[-1.0, -1.0, -1.0]]


def test_alpha_zero_is_ordinary_entropy_regularisation() -> None:
    entropy = torch.tensor([[0.0, 5.0]])
    assert_close(epo(entropy, batch_of(torch.ones(1, 2)), 0.5, alpha=0.0), -entropy)


def test_the_papers_own_band_has_no_lower_side() -> None:
    # kappa_low 0: an entropy of 0.001 is not punished; kappa_high 2: 1.25 is 0.25 above 2 x 0.5
    values = epo(torch.tensor([[0.001, 1.25]]), batch_of(torch.ones(1, 2)), 0.5)
    assert_close(values, torch.tensor([[-0.001, 1.5 * 0.1 * 0.25 - 1.25]]))


def test_a_turn_is_compared_with_its_own_history() -> None:
    # 1.5 alpha 0.1 times what exceeds twice the turn's history; turns 1 (NaN) and 3 (none) are not compared
    entropy = torch.tensor([[1.25, 3.0, 0.5, 3.0, 9.0]], requires_grad=True)
    turn = torch.tensor([[0, 1, 2, 3, -1]])
    batch = batch_of(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])).replace(step_id=turn)
    history = torch.tensor([0.5, math.nan, 0.1])
    term = LOSS_TERMS.bind("epo")
    policy = PolicyTokens(torch.zeros_like(entropy), entropy)
    loss = term(policy, batch, history=history, smoothing=torch.tensor(1.5))
    assert_close(loss.values, torch.tensor([[0.0375 - 1.25, -3.0, 0.045 - 0.5, -3.0, 0.0]]))
    assert loss.metrics["outside"].tolist() == [[1, 0, 1, 0, 0]]
    slope = torch.autograd.grad(loss.values.sum(), entropy)[0]
    assert_close(slope, torch.tensor([[-0.85, -1.0, -0.85, -1.0, 0.0]]))
    with pytest.raises(ValueError, match="no completion of the step has turns"):
        term(policy, batch.replace(step_id=None), history=history, smoothing=torch.tensor(1.5))


@pytest.mark.parametrize("history", [None, 0.5])
def test_padding_reaches_neither_value_nor_gradient(history: float | None) -> None:
    entropy = torch.tensor([[3.0, math.nan]], requires_grad=True)
    batch = batch_of(torch.tensor([[1.0, 0.0]]))
    values = epo(entropy, batch, history)
    slope = torch.autograd.grad(values.sum(), entropy)[0]
    assert values[0, 1] == 0 and slope[0, 1] == 0 and slope[0, 0] != 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("clamped_entropy", "needs the statistic 'clamped_entropy:0.3'"), ("epo", "needs policy.entropy")],
)
def test_a_missing_statistic_is_named(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LOSS_TERMS.bind(name)(PolicyTokens(torch.zeros(1, 1)), batch_of(torch.ones(1, 1)))
