from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rltrain.loss import AGGREGATES
from rltrain.types.policy import StepTotals

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.nan], [math.nan] * 3], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
TOTALS = StepTotals(tokens=4, sequences=2, max_tokens=10)
# token mean 10 / 4; means 2 and 4, their mean 3; sums 6 and 4, their mean 5; 10 / (2 * 10)
WANT = {"token_mean": 2.5, "seq_mean_token_mean": 3.0, "seq_mean_token_sum": 5.0, "dr_grpo": 0.5}


@pytest.mark.parametrize("name", AGGREGATES.names())
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.double()])
def test_empty_rows_are_in_no_mean_and_padding_may_be_nan(name: str, mask: torch.Tensor):
    assert_close(AGGREGATES.bind(name)(LOSS, mask, TOTALS).item(), WANT[name])


@pytest.mark.parametrize("name", AGGREGATES.names())
def test_shares_of_any_split_add_up(name: str):
    aggregate = AGGREGATES.bind(name)
    shares = [
        aggregate(LOSS[rows, :width], MASK[rows, :width], TOTALS).item()
        for rows, width in (([0], 3), ([2, 1], 1))
    ]
    assert_close(sum(shares), WANT[name])


@pytest.mark.parametrize("name", AGGREGATES.names())
def test_one_value_per_sequence_stands_for_each_of_its_tokens(name: str):
    aggregate = AGGREGATES.bind(name)
    values = torch.tensor([[2.0], [-1.0], [math.nan]])
    assert_close(aggregate(values, MASK, TOTALS), aggregate(values.expand(3, 3), MASK, TOTALS))


def test_a_sequence_value_survives_the_sequence_mean():
    # (2 - 1) / 2, whatever the lengths
    assert (
        AGGREGATES.bind("seq_mean_token_mean")(torch.tensor([[2.0], [-1.0], [9.0]]), MASK, TOTALS).item()
        == 0.5
    )


def test_dr_grpo_divides_by_a_constant_and_counts_completions():
    # the same tokens padded to 300 columns: no change; verl's norm form (10 / L_max) is `sequences` times as
    # much
    padded = torch.nn.functional.pad(LOSS, (0, 297), value=math.nan)
    wide = AGGREGATES.bind("dr_grpo")(padded, torch.nn.functional.pad(MASK, (0, 297)), TOTALS)
    assert_close(wide.item() * TOTALS.sequences, 10 / 10)


@pytest.mark.parametrize("name", AGGREGATES.names())
def test_an_update_without_a_token_has_loss_zero(name: str):
    empty = StepTotals(tokens=0, sequences=0, max_tokens=10)
    values = torch.full((2, 3), math.nan, requires_grad=True)
    share = AGGREGATES.bind(name)(values, torch.zeros(2, 3), empty)
    assert share.item() == 0
    assert not torch.autograd.grad(share, values)[0].any()


@pytest.mark.parametrize("name", AGGREGATES.names())
def test_padding_gets_no_gradient(name: str):
    values = LOSS.clone().requires_grad_()
    slope = torch.autograd.grad(AGGREGATES.bind(name)(values, MASK, TOTALS), values)[0]
    assert (slope[MASK.bool()] > 0).all() and not slope[~MASK.bool()].any()
