"""GTPO, GRPO-S and EM-RL beyond their known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage.entropy_shaped import em_rl, grpo_s, gtpo

NAN = math.nan


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_step(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """16 rows in 2 shuffled groups, half right; lengths 0 to 6; entropies with NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([3, 70])[torch.randperm(16, generator=generator) % 2]
    rewards = (torch.rand(16, generator=generator) > 0.5).double()
    mask = torch.arange(6) < torch.randint(0, 7, (16, 1), generator=generator)
    entropy = torch.rand(16, 6, generator=generator, dtype=torch.float64) * 2
    return rewards, group, mask, entropy.masked_fill(~mask, NAN)


def by_loops(rewards: Tensor, group: Tensor, mask: Tensor, entropy: Tensor, joint: bool) -> np.ndarray:
    """GTPO's equations, with a loop for each sum."""
    shaped = np.zeros(mask.shape)
    for i, t in np.argwhere(mask.numpy()):
        alive = [
            k for k in range(len(rewards)) if group[k] == group[i] and rewards[k] == rewards[i] and mask[k, t]
        ]
        share = {k: entropy[k, t].item() ** (1 if rewards[i] > 0 else -1) for k in alive}
        size = 1.0 + 0.1 * len(alive) * share[i] / sum(share.values())
        shaped[i, t] = size if rewards[i] > 0 else -size
    out = np.zeros(mask.shape)
    for prompt in group.unique():
        for side in (None,) if joint else (0.0, 1.0):
            rows = (group == prompt) & (torch.ones(16, dtype=torch.bool) if side is None else rewards == side)
            where = (mask & rows[:, None]).numpy()
            out[where] = (shaped[where] - shaped[where].mean()) / np.sqrt(shaped[where].var() + 1e-8)
    return out


@pytest.mark.parametrize("normalise", ["joint", "separate"])
@pytest.mark.parametrize("seed", range(3))
def test_gtpo_is_its_equations(normalise: str, seed: int):
    rewards, group, mask, entropy = random_step(seed)
    got = gtpo(rewards, group, mask=mask, old_entropy=entropy, normalise=normalise)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        got.numpy(), by_loops(rewards, group, mask, entropy, normalise == "joint"), atol=1e-9
    )


def test_gtpo_without_entropy_weight_is_the_outcome_normalised_over_tokens():
    # alpha2 = 0: r = +-1. One group, 3 right and 2 wrong tokens: mean 0.2, variance 0.96, (1 - 0.2) /
    # sqrt(0.96), (-1 - 0.2) / sqrt(0.96)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    entropy = f64([[0.3, 0.9, 0.1], [0.4, 2.0, NAN]])
    got = gtpo(
        f64([1, 0]), torch.zeros(2, dtype=torch.int64), mask=mask, old_entropy=entropy, alpha2=0.0, eps=0.0
    )
    right = 0.8 / math.sqrt(0.96)
    wrong = -1.2 / math.sqrt(0.96)
    assert_close(got, f64([[right] * 3, [wrong, wrong, 0.0]]))
    apart = gtpo(
        f64([1, 0]),
        torch.zeros(2, dtype=torch.int64),
        mask=mask,
        old_entropy=entropy,
        alpha2=0.0,
        normalise="separate",
    )
    assert torch.equal(apart, torch.zeros(2, 3, dtype=torch.float64))  # the sign is lost


@pytest.mark.parametrize("right", [True, False])
def test_gtpo_rewards_doubt_in_right_answers_and_punishes_confidence_in_wrong_ones(right: bool):
    rewards = f64([1.0, 1.0, 0.0] if right else [0.0, 0.0, 1.0])
    entropy = f64([[0.2], [0.8], [0.5]])
    got = gtpo(rewards, torch.zeros(3, dtype=torch.int64), mask=torch.ones(3, 1), old_entropy=entropy)[:, 0]
    assert got[0] < got[1]
    assert (got[:2] > 0).all() == right


def test_zero_entropies_share_alike():
    # all clamped to entropy_min: every share is the mean, so r = 1.1 and -1.1 exactly; one position has no
    # entropy at all
    got = gtpo(
        f64([1, 1, 0, 0]),
        torch.zeros(4, dtype=torch.int64),
        mask=torch.ones(4, 2),
        old_entropy=torch.zeros(4, 2).double(),
        eps=0.0,
    )
    assert_close(got, f64([[1.0] * 2] * 2 + [[-1.0] * 2] * 2))


@pytest.mark.parametrize("method", [gtpo, grpo_s])
def test_raw_correctness_decides_before_the_reward(method):
    # a right answer whose length penalty makes the reward negative is right; without correct the sign decides
    rewards = f64([-0.5, 0.2, 1.0, -1.0])
    correct = f64([1.0, 0.0, NAN, NAN])
    inputs = {"mask": torch.ones(4, 2), "old_entropy": torch.rand(4, 2, dtype=torch.float64) + 0.1}
    group = torch.zeros(4, dtype=torch.int64)
    got = method(rewards, group, correct=correct, **inputs)
    assert_close(got, method(f64([1, 0, 1, 0]), group, **inputs))


@pytest.mark.parametrize("method", [gtpo, grpo_s])
def test_ungraded_and_empty_rows_change_nothing_for_the_others(method):
    rewards, group, mask, entropy = random_step(1)
    mask = mask.clone()
    mask[0] = True
    entropy = torch.where(mask, entropy.nan_to_num(0.7), NAN)
    rewards = torch.where(torch.arange(16) == 0, NAN, rewards)
    kept = torch.nonzero((torch.arange(16) > 0) & mask.any(1)).flatten()
    got = method(rewards, group, mask=mask, old_entropy=entropy)
    assert got.isfinite().all() and not got[0].any() and not got[~mask.any(1)].any()
    assert_close(got[kept], method(rewards[kept], group[kept], mask=mask[kept], old_entropy=entropy[kept]))
    single = method(rewards[:1], group[:1], mask=mask[:1], old_entropy=entropy[:1])
    assert not single.any()


@pytest.mark.parametrize("method", [gtpo, grpo_s])
def test_entropies_carry_no_gradient(method):
    entropy = (torch.rand(4, 3, dtype=torch.float64) + 0.1).requires_grad_()
    got = method(
        f64([1, 0, 1, 0]), torch.zeros(4, dtype=torch.int64), mask=torch.ones(4, 3), old_entropy=entropy
    )
    assert method is grpo_s or not got.requires_grad
    assert not got.detach().requires_grad


def test_one_right_answer_among_its_kind_has_a_constant_reward():
    # a single sequence alive at t: the share is 1 whatever its entropy, and GRPO-S's likewise
    entropy = f64([[0.1, 1.9], [0.5, 0.5]])
    got = gtpo(
        f64([1, 0]), torch.zeros(2, dtype=torch.int64), mask=torch.ones(2, 2), old_entropy=entropy, eps=0.0
    )
    assert_close(got, f64([[1.0, 1.0], [-1.0, -1.0]]))


def test_em_rl_prefers_the_likelier_and_ignores_rewards():
    logp = f64([[-1.0, -1.0], [-1.0, -2.0], [-2.0, -0.5], [-1.5, -2.5]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    group = torch.zeros(4, dtype=torch.int64)
    certainty = em_rl(f64([0, 0, 0, 0]), group, mask=mask, old_logp=logp, old_entropy=-logp)
    assert_close(certainty, em_rl(f64([5, -3, 2, 9]), group, mask=mask, old_logp=logp, old_entropy=logp))
    assert_close(certainty.sum(), f64(0.0))
    assert certainty.argmax() == 0
    # "token" is minus the entropies' sum: with H = -lp the same numbers
    assert_close(
        certainty,
        em_rl(f64([0, 0, 0, 0]), group, mask=mask, old_logp=logp * 7, old_entropy=-logp, reward="token"),
    )


def test_em_rl_leaves_empty_and_ungraded_rows_out():
    logp = f64([[-1.0, NAN], [-3.0, NAN], [NAN, NAN], [-2.0, NAN]])
    mask = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 0]]).bool()
    got = em_rl(
        f64([0, 0, 0, NAN]), torch.zeros(4, dtype=torch.int64), mask=mask, old_logp=logp, old_entropy=logp
    )
    assert_close(got, f64([2.0, -2.0, 0.0, 0.0]))  # rewards -1 and -3: each less the other
