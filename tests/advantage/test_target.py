"""Target distributions and the pull towards them: identities of arXiv:2205.11275 on four answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.advantage.target import (
    binary_moment,
    dpg,
    effective_sample_size,
    fit_moments,
    kl_to_target,
    log_partition,
    log_tilted_prob,
    pull,
)

P0 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
PHI = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
COUNTS = torch.tensor([4, 3, 2, 1])  # ten samples in the reference's proportions: sample means are exact
SAMPLES = torch.repeat_interleave(torch.arange(4), COUNTS)
ONE_PROMPT = torch.zeros(10, dtype=torch.int64)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def test_the_optimum_of_kl_regularised_rl_is_the_tilted_reference():
    log_p = log_tilted_prob(P0.log(), REWARD, 1.0)
    close(torch.softmax(log_p, 0), 0.085073, 0.173439, 0.314304, 0.427184)
    log_z = log_partition((log_p - P0.log())[SAMPLES])
    assert float(log_z) == pytest.approx(1.547956, abs=1e-6)
    # E_pi[r] - beta KL(pi, pi_0) = beta log Z - beta KL(pi, p) for any pi and beta
    for seed, beta in ((0, 1.0), (1, 0.3), (2, 5.0)):
        policy = torch.softmax(
            torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 0
        )
        target = torch.softmax(log_tilted_prob(P0.log(), REWARD, beta), 0)
        log_z = torch.logsumexp(log_tilted_prob(P0.log(), REWARD, beta), 0)
        monitor = kl_to_target(log_z, (policy * REWARD).sum(), kl(policy, P0), beta)
        torch.testing.assert_close(monitor, kl(policy, target))


def test_a_binary_moment_has_a_closed_form_and_the_fit_finds_it():
    lam = binary_moment(0.6, 0.7)
    assert lam == pytest.approx(0.441833, abs=1e-6)
    target = torch.softmax(P0.log() + lam * PHI, 0)
    close(target, 0.466667, 0.225, 0.233333, 0.075)
    assert float((target * PHI).sum()) == pytest.approx(0.7)
    moments = torch.tensor([0.7], dtype=torch.float64)
    assert float(fit_moments(PHI[SAMPLES][:, None], moments)) == pytest.approx(lam, abs=1e-3)
    assert float(fit_moments(PHI[:, None], moments, weight=P0)) == pytest.approx(lam, abs=1e-3)


def test_several_moments_at_once():
    features = torch.stack([PHI, torch.tensor([0.0, 0.0, 1.0, 1.0]).double()], 1)
    moments = torch.tensor([0.5, 0.5], dtype=torch.float64)
    lam = fit_moments(features, moments, weight=P0, iterations=5000)
    p = torch.softmax(P0.log() + features @ lam, 0)
    torch.testing.assert_close(p @ features, moments, rtol=0, atol=1e-4)


def test_moments_out_of_reach_are_an_error():
    with pytest.raises(ValueError, match="still missed"):
        fit_moments(torch.zeros(5, 1), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        binary_moment(0.0, 0.5)


DIVERGENCES: dict[str, Any] = {  # D_f(pi, p) = E_p[f(pi / p)]
    "forward_kl": lambda t: -t.log(),
    "reverse_kl": lambda t: t * t.log(),
    "js": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "total_variation": lambda t: 0.5 * (t - 1).abs(),
    "chi_squared": lambda t: (t - 1) ** 2,
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_pull_is_the_divergences_gradient(divergence: Any):
    logits = P0.log().clone().requires_grad_()
    policy = torch.softmax(logits, 0)
    target = torch.softmax(log_tilted_prob(P0.log(), REWARD, 2.0), 0)
    (target * DIVERGENCES[divergence](policy / target)).sum().backward()
    # score function: -sum_y pi(y) A(y) d log pi(y) / d logits, with A = -f'(pi / p); any constant baseline
    # changes nothing
    for baseline in (0.0, 1.0):
        advantage = pull((policy / target).log(), divergence).detach() - baseline
        score = torch.eye(4, dtype=torch.float64) - policy.detach()
        torch.testing.assert_close(-((policy.detach() * advantage)[:, None] * score).sum(0), logits.grad)


def test_the_pull_of_the_forward_kl_is_constant_at_the_target():
    assert torch.equal(pull(torch.zeros(3), "forward_kl"), torch.ones(3))
    logits_gradient = torch.tensor([-0.066667, 0.075, -0.033333, 0.025])
    weight = torch.tensor([1.166667, 0.75, 1.166667, 0.75])
    score = torch.eye(4) - P0.float()
    torch.testing.assert_close(
        -((P0.float() * (weight - 1))[:, None] * score).sum(0), logits_gradient, rtol=0, atol=1e-5
    )


def run(rewards: Tensor, policy: Tensor = P0, **hp: Any) -> Tensor:
    logp = policy.log()[SAMPLES][:, None]
    return dpg(
        rewards,
        ONE_PROMPT,
        mask=torch.ones(10, 1).bool(),
        old_logp=logp,
        ref_logp=P0.log()[SAMPLES][:, None],
        **hp,
    )


def test_dpg_weighs_by_the_posterior_ratio():
    # r = lambda phi at beta 1: p / pi_0 = [7/6, 3/4, 7/6, 3/4]
    got = run(binary_moment(0.6, 0.7) * PHI[SAMPLES], baseline="none")
    torch.testing.assert_close(got, torch.tensor([7 / 6, 3 / 4, 7 / 6, 3 / 4]).double()[SAMPLES])
    torch.testing.assert_close(run(binary_moment(0.6, 0.7) * PHI[SAMPLES]), got - 1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dpg_vanishes_at_its_target_and_pushes_by_reward(divergence: Any):
    assert (run(torch.zeros(10).double(), divergence=divergence).abs() < 1e-12).all()
    advantage = run(REWARD[SAMPLES], divergence=divergence)
    assert (advantage.diff() >= -1e-12).all() and advantage[-1] > 0 > advantage[0]


def test_dpg_under_the_reverse_kl_is_kl_regularised_policy_gradient():
    # -log(pi / p) - 1 less its mean: r / beta - log(pi / pi_0), centred
    policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    got = run(REWARD[SAMPLES], policy=policy, divergence="reverse_kl", beta=0.5)
    plain = (REWARD / 0.5 - (policy / P0).log())[SAMPLES]
    torch.testing.assert_close(got, plain - plain.mean())


def test_dpg_sums_over_tokens_and_leaves_ungraded_and_empty_rows_out():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    old = torch.where(mask, -0.5, torch.nan).double()
    ref = torch.where(mask, -0.7, torch.nan).double()
    rewards = torch.tensor([1.0, 0.0, math.nan, 1.0]).double()
    got = dpg(rewards, torch.zeros(4).long(), mask=mask, old_logp=old, ref_logp=ref, baseline="none")
    # sums of -0.2 over two and three tokens, plus reward
    weights = torch.tensor([math.exp(-0.4 + 1), math.exp(-0.6)])
    torch.testing.assert_close(got[:2].float(), weights / weights.mean())
    assert got[2:].tolist() == [0, 0]


def test_dpg_keeps_extreme_weights_finite():
    rewards = torch.tensor([0.0] * 9 + [5e3]).double()
    got = run(rewards, baseline="none")
    assert got.isfinite().all() and float(got[-1]) == pytest.approx(10)  # all of the mean is one sample
    assert run(-rewards, divergence="reverse_kl", baseline="none").abs().max() <= 1000


def test_prompts_have_their_own_normaliser_unless_told_otherwise():
    rewards = torch.cat([REWARD[SAMPLES], REWARD[SAMPLES] + 7])
    logp = P0.log()[SAMPLES].repeat(2)[:, None]
    facts: dict[str, Any] = {"mask": torch.ones(20, 1).bool(), "old_logp": logp, "ref_logp": logp}
    group = torch.arange(2).repeat_interleave(10)
    advantages = dpg(rewards, group, **facts)
    torch.testing.assert_close(advantages[:10], advantages[10:])  # a prompt's constant does not matter
    assert not torch.allclose(dpg(rewards, group, partition="step", **facts)[:10], advantages[:10])


def test_the_effective_sample_size_counts_equal_weights():
    assert float(effective_sample_size(torch.full((8,), -1e4))) == pytest.approx(8)
    assert float(effective_sample_size(torch.tensor([0.0, -1e4]))) == pytest.approx(1)
    assert float(effective_sample_size(torch.tensor([3.0, 1.0]).log())) == pytest.approx(16 / 10)
