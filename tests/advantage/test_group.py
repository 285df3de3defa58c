from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage import ADVANTAGES
from rltrain.advantage.group import (
    group_mean,
    group_norm,
    informative_groups,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)

NAN = math.nan


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def random_step(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """12 rewards, 3 groups of 4 in shuffled order, and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(12, generator=generator)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, 6, (12,), generator=generator)
    lengths[3] = 0
    return rewards, ids(*[40, 7, 900] * 4)[order], torch.arange(6) < lengths[:, None]


def call(name: str, rewards: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """The estimator's result, with all other inputs computed from the row itself: rows may be left out or
    come in any order.
    """
    # Every row is the policy's, so aapo has no reference rows to pair with.
    bound = ADVANTAGES.bind(name, {"reference": "mean"} if name == "aapo" else {})
    position = torch.arange(1, mask.shape[1] + 1, dtype=torch.float64)
    per_token = 0.1 * position * (1 + mask.double().sum(1, keepdim=True))
    tensors = {
        "mask": mask,
        "old_logp": -per_token,
        "ref_logp": -1.2 * per_token,
        "old_entropy": per_token,
        "process_reward": per_token.cos(),
    }
    tensors |= {
        "source": torch.zeros_like(group),
        "correct": torch.where(rewards.isnan(), rewards.double(), (rewards > 0).double()),
    }
    parts = {"right": rewards, "short": torch.where(rewards.isnan(), rewards, mask.double().sum(1))}
    inputs = tensors | {"version": torch.zeros_like(mask, dtype=torch.int64), "parts": parts}
    return bound(rewards, group, **{key: inputs[key] for key in bound.spec.inputs})


@pytest.mark.parametrize("name", ["group_norm", "group_mean", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rewards_give_exactly_zero(name: str, dtype: torch.dtype):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in floating point: a naive mean leaves 1e-17 (or 7e-9), which eps does
    # not hide
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7], dtype=dtype)
    advantages = ADVANTAGES.bind(name)(rewards, ids(1, 1, 1, 2, 2, 2, 2))
    assert torch.equal(advantages, torch.zeros(7, dtype=dtype))


def test_a_step_of_identical_rewards_whitens_to_exactly_zero():
    mask = torch.ones(3, 2)
    assert torch.equal(
        reinforce_pp(f64([0.1] * 3), ids(0, 0, 0), mask=mask), torch.zeros(3, 2, dtype=torch.float64)
    )
    assert torch.equal(
        reinforce_pp_baseline(f64([0.1] * 3), ids(0, 0, 0), mask=mask), torch.zeros(3, 2, dtype=torch.float64)
    )


def test_rloo_is_g_over_g_minus_1_times_dr_grpo():
    rewards, group, _ = random_step()
    assert_close(rloo(rewards, group), 4 / 3 * group_mean(rewards, group))


def test_rloo_is_the_reward_minus_the_mean_of_the_others():
    rewards, group, _ = random_step(1)
    others = [rewards[(group == group[i]) & (torch.arange(12) != i)].mean() for i in range(12)]
    assert_close(rloo(rewards, group), rewards - torch.stack(others))


@pytest.mark.parametrize("name", ["group_norm", "group_mean", "rloo", "reinforce_pp_baseline"])
def test_a_constant_added_to_one_group_changes_nothing(name: str):
    rewards, group, mask = random_step(2)
    assert_close(call(name, rewards + 5.0 * (group == 7), group, mask), call(name, rewards, group, mask))


def test_reinforce_pp_has_no_group_baseline():
    rewards, group, mask = random_step(2)
    assert not torch.allclose(
        call("reinforce_pp", rewards + 5.0 * (group == 7), group, mask),
        call("reinforce_pp", rewards, group, mask),
    )


def test_grpo_does_not_see_the_scale_of_a_groups_rewards():
    rewards, group, _ = random_step(3)
    scaled = torch.where(group == 7, 10 * rewards, rewards)
    assert_close(group_norm(scaled, group, eps=0.0), group_norm(rewards, group, eps=0.0))


def test_batch_scale_divides_every_group_by_one_deviation():
    rewards, group, _ = random_step(4)
    assert_close(
        group_norm(rewards, group, scale="batch", eps=1e-4),
        group_mean(rewards, group) / (rewards.std() + 1e-4),
    )


def test_scale_none_is_dr_grpo():
    rewards, group, _ = random_step(4)
    assert torch.equal(group_norm(rewards, group, scale="none"), group_mean(rewards, group))


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_groups_are_ids_and_rows_have_no_order(name: str):
    rewards, group, mask = random_step(5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert_close(
        call(name, rewards[order], group[order] * 3 - 100, mask[order]),
        call(name, rewards, group, mask)[order],
    )


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_ungraded_rows_take_part_in_no_statistic_and_get_zero(name: str):
    # the rows that were graded get what they would get if the ungraded ones had never been sampled
    rewards, group, mask = random_step(6)
    failed = torch.zeros(12, dtype=torch.bool)
    failed[[1, 4]] = True
    got = call(name, torch.where(failed, NAN, rewards), group, mask)
    assert_close(got[~failed], call(name, rewards[~failed], group[~failed], mask[~failed]))
    assert not got[failed].any()


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_a_step_without_a_single_graded_row_gives_zeros(name: str):
    got = call(name, f64([NAN, NAN]), ids(1, 1), torch.ones(2, 3))
    assert not got.any() and got.shape[0] == 2


@pytest.mark.parametrize("name", ["group_norm", "group_mean", "rloo"])
def test_the_only_graded_row_of_a_group_gets_zero(name: str):
    # nothing to compare it with; [1, 0] beside it are untouched
    got = ADVANTAGES.bind(name)(f64([3.0, NAN, 1.0, 0.0]), ids(1, 1, 2, 2))
    assert got[0] == got[1] == 0 and got[2] == -got[3] > 0


def test_rloo_refuses_a_group_of_one_and_names_it():
    with pytest.raises(ValueError, match=r"group 41 has 1 completion.*raise rollout\.n"):
        rloo(f64([1.0, 0.0, 1.0]), ids(3, 3, 41))


def test_grpo_gives_a_group_of_one_zero():
    assert group_norm(f64([5.0]), ids(1)).tolist() == [0.0]


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitened_advantages_have_mean_0_and_variance_1_over_valid_tokens(name: str):
    rewards, group, mask = random_step(7)
    advantages = call(name, rewards, group, mask)
    assert_close(advantages[mask].mean(), f64(0.0), atol=1e-12, rtol=0)
    assert_close(advantages[mask].std(), f64(1.0))
    assert not advantages[~mask].any()


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_float_mask_is_as_good_as_a_bool_one(name: str):
    rewards, group, mask = random_step(7)
    assert torch.equal(call(name, rewards, group, mask.double()), call(name, rewards, group, mask))


def returns_by_loop(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The definition, one valid token at a time from the end."""
    out = torch.zeros_like(token_rewards)
    for row in range(mask.shape[0]):
        after = 0.0
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            after = float(token_rewards[row, t]) + gamma * after
            out[row, t] = after
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_reinforce_pp_is_the_whitened_discounted_return(gamma: float, kl_coef: float):
    # a mask with a hole (a tool's answer): its tokens neither earn nor discount
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    old, ref = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    old[~mask] = NAN
    token_rewards = torch.where(mask, -kl_coef * (old - ref), 0.0)
    for row, (last, reward) in enumerate([(5, 1.0), (6, -0.5), (0, 2.0)]):
        token_rewards[row, last] += reward
    want = returns_by_loop(token_rewards, mask, gamma)
    want = torch.where(mask, (want - want[mask].mean()) / (want[mask].var() + 1e-8).sqrt(), 0.0)
    got = reinforce_pp(
        f64([1.0, -0.5, 2.0]),
        ids(0, 0, 1),
        mask=mask,
        old_logp=old,
        ref_logp=ref,
        gamma=gamma,
        kl_coef=kl_coef,
    )
    assert_close(got, want)


def test_reinforce_pp_with_a_kl_penalty_asks_for_the_reference():
    assert ADVANTAGES.bind("reinforce_pp").needs == {"mask"}
    bound = ADVANTAGES.bind("reinforce_pp", {"kl_coef": 0.01})
    assert bound.needs == {"mask", "old_logp", "ref_logp"}
    with pytest.raises(ValueError, match=r"kl_coef is 0\.01 but ref_logp was not computed"):
        bound(f64([1.0]), ids(0), mask=torch.ones(1, 2), old_logp=torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_integer_rewards_are_numbers_and_nothing_carries_a_gradient(name: str):
    mask = torch.ones(4, 2)
    advantages = call(name, torch.tensor([1, 0, 0, 1]), ids(1, 1, 2, 2), mask)
    assert_close(advantages, call(name, torch.tensor([1.0, 0.0, 0.0, 1.0]), ids(1, 1, 2, 2), mask))
    assert not call(name, f64([1.0, 0.0, 0.0, 1.0]).requires_grad_(), ids(1, 1, 2, 2), mask).requires_grad


def test_dynamic_sampling_keeps_prompts_with_some_but_not_all_correct():
    # 1.dapo.keep: 0, 3 and 8 correct of 8 -> keep only the second
    correct = torch.tensor([0.0] * 8 + [1.0] * 3 + [0.0] * 5 + [1.0] * 8)
    group = torch.arange(3).repeat_interleave(8)
    assert informative_groups(correct, group).view(3, 8).all(1).tolist() == [False, True, False]
    assert informative_groups(correct.bool(), group)[::8].tolist() == [False, True, False]


def test_dynamic_sampling_must_not_look_at_a_length_penalty():
    # all wrong, different lengths: informative only if one asks the wrong number
    correct = torch.zeros(2)
    penalised = torch.tensor([-0.1, -0.5])
    group = ids(1, 1)
    assert not informative_groups(correct, group).any()
    assert informative_groups(penalised, group).all()


def test_dynamic_sampling_judges_by_graded_completions():
    # group 1: correct, correct, ungraded -> nothing to learn; group 2: correct, wrong, ungraded -> something
    values = torch.tensor([1.0, 1.0, NAN, 1.0, 0.0, NAN])
    assert informative_groups(values, ids(1, 1, 1, 2, 2, 2)).tolist() == [False] * 3 + [True] * 3
