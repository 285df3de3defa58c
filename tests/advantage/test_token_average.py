"""HAPO's token-level group average."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage.group import group_norm
from rltrain.advantage.token_average import hapo


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths(*values: int) -> Tensor:
    return torch.arange(max(values)) < torch.tensor(values)[:, None]


def test_a_prompts_advantages_add_up_to_0_over_its_tokens():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    group = torch.tensor([9, 4, 4] * 4)
    mask = lengths(*torch.randint(0, 6, (11,), generator=generator).tolist(), 7)
    got = hapo(rewards, group, mask=mask, limit=None)
    for prompt in (4, 9):
        tokens = (got[:, None] * mask)[group == prompt]
        assert_close(tokens.sum(), f64(0.0), atol=1e-12, rtol=0)
        # population variance over tokens is 1, up to eps
        assert_close(tokens.square().sum() / mask[group == prompt].sum(), f64(1.0), atol=1e-5, rtol=0)


def test_equal_lengths_give_grpo_with_the_population_deviation():
    rewards = f64([1, 0, 0, 0.5])
    group = torch.zeros(4, dtype=torch.int64)
    assert_close(hapo(rewards, group, mask=torch.ones(4, 3)), group_norm(rewards, group, ddof=0))


def test_identical_rewards_give_exactly_zero():
    got = hapo(torch.tensor([0.1, 0.1, 0.1]), torch.zeros(3, dtype=torch.int64), mask=lengths(2, 1, 3))
    assert torch.equal(got, torch.zeros(3))


def test_only_the_prompt_that_goes_too_far_falls_back_to_grpo():
    # 1 token of reward 1 among 27: A = sqrt(26) > 5; the other prompt is left alone
    rewards = f64([1, 0, 0, 1, 0, 0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = lengths(1, 13, 13, 2, 1, 3)
    got = hapo(rewards, group, mask=mask)
    assert_close(got[:3], group_norm(rewards[:3], group[:3]))
    assert_close(got[3:], hapo(rewards[3:], group[3:], mask=mask[3:], limit=None))
    assert_close(hapo(rewards, group, mask=mask, limit=None)[0], f64(math.sqrt(26)), atol=1e-4, rtol=0)


def test_padding_does_not_call_for_the_fall_back():
    # rewards 1 and 0.9: a padded position read as reward 0 would be 19 deviations away, no token is more than
    # 1
    rewards = f64([1.0, 0.9])
    group = torch.zeros(2, dtype=torch.int64)
    assert_close(
        hapo(rewards, group, mask=torch.tensor([[1, 0, 0], [1, 0, 0]])), f64([1.0, -1.0]), atol=1e-4, rtol=0
    )


def test_ungraded_and_empty_rows_take_no_part():
    rewards = f64([1.0, 0.0, math.nan, 7.0])
    group = torch.zeros(4, dtype=torch.int64)
    got = hapo(rewards, group, mask=torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]]))
    assert_close(
        got, torch.cat([hapo(rewards[:2], group[:2], mask=torch.tensor([[1, 1], [1, 0]])), f64([0, 0])])
    )
    assert not hapo(f64([math.nan, math.nan]), group[:2], mask=torch.ones(2, 1)).any()
