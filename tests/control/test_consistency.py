"""COPO: consistency entropies, global advantages, and how the two losses are mixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage.group import group_norm
from rltrain.control.consistency import consistency_entropy, copo
from rltrain.loss.policy.clip import clip
from rltrain.loss.policy.copo import copo as copo_loss
from rltrain.types.policy import PolicyTokens, TrainBatch


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(answers: list[str], rewards: list[list[float]]) -> TrainBatch:
    """One prompt per entry, 2 tokens per completion; "-" is no answer. Advantages are GRPO's."""
    group = torch.tensor([7 * i + 3 for i, said in enumerate(answers) for _ in said])
    reward = f64([value for row in rewards for value in row])
    local = group_norm(reward, group)[:, None].expand(-1, 2).contiguous()
    return TrainBatch(
        mask=torch.ones(len(group), 2),
        advantages=local,
        weights=torch.ones_like(local),
        rewards=reward,
        group=group,
        source=torch.zeros_like(group),
        version=torch.zeros_like(group),
        answer=torch.tensor(
            [-1 if letter == "-" else "abcdefgh".index(letter) for letter in "".join(answers)]
        ),
    )


MIXED = batch_of(["aaab", "aaaa", "abcd", "bb--"], [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])


def test_unanimous_prompts_have_entropy_exactly_0_and_no_answer_is_an_answer_of_its_own():
    counted = torch.ones(16, dtype=torch.bool)
    assert MIXED.answer is not None
    entropy = consistency_entropy(MIXED.answer, MIXED.group, counted).reshape(4, 4)[:, 0]
    assert entropy[1] == 0
    assert_close(entropy, f64([0.8112781244591328, 0.0, 2.0, 1.0]))


def test_b_at_minus_infinity_is_grpo():
    after = copo(MIXED, b=-1e9)
    assert_close(after.advantages, MIXED.advantages)
    assert not after.extra["advantage_global"].any()
    assert torch.equal(copo(MIXED, mode="local").advantages, MIXED.advantages)


def test_a_unanimous_prompt_leans_on_its_global_advantage():
    # k = 20, b = 0.5, H = 0: w = 4.5e-5 < 1e-4
    after = copo(MIXED)
    only = copo(MIXED, mode="global")
    assert_close(after.extra["advantage_global"][4:8], only.extra["advantage_global"][4:8], rtol=1e-4, atol=0)
    assert (after.extra["advantage_global"][4:8] < 0).all()  # all wrong while others are right


@pytest.mark.parametrize("mode", ["forced", "soft_forced"])
def test_the_forced_modes_leave_no_group_of_equal_rewards_without_a_signal(mode: str):
    # all wrong with distinct wrong answers: H = 2, w = 1, local advantage 0: the soft mode says nothing
    batch = batch_of(["abcd", "aaab"], [[0, 0, 0, 0], [1, 1, 1, 0]])
    soft = copo(batch, mode="soft").extra["advantage_global"][:4]
    forced = copo(batch, mode=mode).extra["advantage_global"][:4]  # type: ignore[arg-type]
    assert soft.abs().max() < 1e-10
    assert (forced < -0.1).all()


def test_the_zero_modes_ask_for_a_reward():
    after = copo(MIXED, mode="zero")
    right = (MIXED.rewards != 0)[:, None].expand(-1, 2)
    assert_close(after.advantages, torch.where(right, MIXED.advantages, 0.0))
    assert not after.extra["advantage_global"][right].any()
    soft = copo(MIXED)
    soft_zero = copo(MIXED, mode="soft_zero")
    assert_close(soft_zero.advantages, torch.where(right, soft.advantages, 0.0))


def test_global_advantages_are_normalised_over_prompts_however_many_completions_they_have():
    # mean rewards 1, 0.5, 0 of groups of 1, 2 and 4: mean 0.5, std 0.5 over prompts
    batch = batch_of(["a", "ab", "abcd"], [[1], [1, 0], [0, 0, 0, 0]])
    got = copo(batch, mode="global", eps=0.0).extra["advantage_global"][:, 0]
    assert_close(got, f64([1, 0, 0, -1, -1, -1, -1]))


def test_the_coefficient_multiplies_the_global_part_alone():
    unit = copo(MIXED)
    three = copo(MIXED, coefficient=3.0)
    assert_close(three.extra["advantage_global"], 3 * unit.extra["advantage_global"])
    assert_close(three.advantages, unit.advantages)


def test_the_discount_is_the_papers_rate():
    # G = 4: lambda = (1 - 1/4) / 2; all distinct: H = 2, so the mean reward keeps 1 - 0.75 = 1/4; unanimous
    # keeps all
    batch = batch_of(["abcd", "aaaa"], [[1, 1, 1, 1], [1, 1, 1, 1]])
    got = copo(batch, mode="global", discount=True, eps=0.0).extra["advantage_global"][::4, 0]
    assert_close(got, f64([-1, 1]) / math.sqrt(2))  # 0.25 and 1, std 0.75 / sqrt(2)


def test_ungraded_and_empty_rows_take_no_part():
    rewards = MIXED.rewards.clone()
    rewards[0] = math.nan
    mask = MIXED.mask.clone()
    mask[5] = False
    batch = MIXED.replace(
        rewards=rewards, mask=mask, advantages=MIXED.advantages.masked_fill(~mask, math.nan)
    )
    kept = torch.tensor([row for row in range(16) if row not in (0, 5)])
    after = copo(batch)
    rest = copo(batch.rows(kept))
    assert_close(after.extra["advantage_global"][kept], rest.extra["advantage_global"])
    assert_close(after.advantages[kept], rest.advantages)
    assert not after.extra["advantage_global"][[0, 5]].any()


def test_one_prompt_alone_and_equal_prompts_have_no_global_advantage():
    assert not copo(batch_of(["ab"], [[1, 0]]), mode="global").extra["advantage_global"].any()
    assert (
        not copo(batch_of(["ab", "aa"], [[0.1, 0.1], [0.1, 0.1]]), mode="global")
        .extra["advantage_global"]
        .any()
    )


def test_without_answers_it_says_who_extracts_them():
    with pytest.raises(ValueError, match="needs the completions' answers"):
        copo(MIXED.replace(answer=None))


@pytest.mark.parametrize("mode", ["soft", "forced", "soft_zero", "global"])
def test_the_loss_is_the_weighted_sum_of_two_clipped_losses_value_and_gradient(mode: str):
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(16, 2, generator=generator, dtype=torch.float64) - 0.5
    logp = (old + 0.6 * torch.randn(16, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    batch = MIXED.replace(old_logp=old)
    got = copo_loss(PolicyTokens(logp), copo(batch, mode=mode, k=2.0, b=1.0)).values  # type: ignore[arg-type]

    entropy = np.repeat([0.8112781244591328, 0.0, 2.0, 1.0], 4)
    soft = 1 / (1 + np.exp(-2 * (entropy - 1)))
    moves = (batch.advantages[:, 0] != 0).numpy()
    right = (batch.rewards != 0).numpy()
    w = f64(
        {"soft": soft, "forced": moves * 1.0, "soft_zero": soft * right, "global": soft * 0}[mode].tolist()
    )[:, None]
    mean = np.array([0.75, 0.0, 0.25, 0.5])
    prompt = f64(np.repeat((mean - mean.mean()) / (mean.std(ddof=1) + 1e-6), 4).tolist())[:, None].expand(
        16, 2
    )
    parts = [
        clip(PolicyTokens(logp), batch.replace(advantages=a), dual_clip=3.0).values
        for a in (batch.advantages, prompt)
    ]
    want = w * parts[0] + (1 - w) * parts[1]
    assert_close(got, want)
    assert_close(
        torch.autograd.grad(got.sum(), logp, retain_graph=True)[0], torch.autograd.grad(want.sum(), logp)[0]
    )
