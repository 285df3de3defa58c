"""Losses that read what a control leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.policy.clip import clip
from rltrain.loss.policy.hapo import hapo, hapo_bounds, redistribute_advantages
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(old: Tensor, advantages: Tensor, **extra: Tensor) -> TrainBatch:
    rows = torch.zeros(len(old), dtype=torch.int64)
    return TrainBatch(
        mask=torch.ones_like(old),
        advantages=advantages,
        weights=torch.ones_like(old),
        rewards=rows.double(),
        group=rows,
        source=rows,
        version=rows,
        old_logp=old,
        extra=extra,
    )


def random_step() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    old = -torch.rand(6, 8, generator=generator, dtype=torch.float64) - 0.5
    logp = (old + 0.5 * torch.randn(6, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(6, 1, generator=generator, dtype=torch.float64).expand(6, 8)
    return old, logp, advantages, torch.rand(6, 8, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("silent", ["alpha and beta 0", "h_hat 0"])
def test_hapo_without_a_signal_is_dapos_clip_with_dual_clip_10(silent: str):
    old, logp, advantages, h_hat = random_step()
    batch = batch_of(old, advantages, h_hat=h_hat if silent.startswith("alpha") else torch.zeros_like(h_hat))
    strength = 0.0 if silent.startswith("alpha") else 1.0
    hapo_values = hapo(PolicyTokens(logp), batch, alpha=strength, beta=strength).values
    clip_values = clip(PolicyTokens(logp), batch, eps_high=0.28, dual_clip=10.0).values
    assert_close(hapo_values, clip_values)
    assert_close(
        torch.autograd.grad(hapo_values.sum(), logp, retain_graph=True)[0],
        torch.autograd.grad(clip_values.sum(), logp)[0],
    )


def test_at_ratio_1_certain_tokens_are_damped_and_uncertain_ones_left_alone():
    old = torch.zeros(1, 4).double()
    h_hat = f64([[-1.0, -0.25, 0.0, 0.8]])
    logp = old.clone().requires_grad_()
    values = hapo(PolicyTokens(logp), batch_of(old, torch.ones(1, 4).double(), h_hat=h_hat)).values
    assert_close(-values.detach(), f64([[0.0, 0.75, 1.0, 1.0]]))
    assert_close(-torch.autograd.grad(values.sum(), logp)[0], f64([[0.0, 0.75, 1.0, 1.0]]))


def test_bounds_widen_below_for_certain_and_above_for_uncertain_tokens():
    low, high = hapo_bounds(f64([-1.0, -0.5, 0.0, 0.5, 1.0]), 0.2, 0.28, 1.0)
    assert_close(low, f64([0.4, 0.3, 0.2, 0.2, 0.2]))
    assert_close(high, f64([0.28, 0.28, 0.28, 0.42, 0.56]))


def test_the_neutral_zone_of_the_base_bounds_is_narrower():
    # h_hat = 1, r = 1.17: outside (.., 1.14) of the base, inside (.., 1.28) of the adapted zone
    h_hat = f64([1.0])
    ratio = f64([1.17])
    advantage = f64([1.0])
    low, high = hapo_bounds(h_hat, 0.2, 0.28, 1.0)
    assert redistribute_advantages(advantage, h_hat, ratio, low, high, 1.0) == 1.0
    assert redistribute_advantages(advantage, h_hat, ratio, f64([0.2]), f64([0.28]), 1.0) == 2.0
    old = torch.zeros(1, 1).double()
    batch = batch_of(old, torch.ones(1, 1).double(), h_hat=h_hat[None])
    policy = PolicyTokens(ratio.log()[None])
    assert_close(hapo(policy, batch, zone="base").values, f64([[-2.34]]))
    assert_close(hapo(policy, batch).values, f64([[-1.17]]))


@pytest.mark.parametrize("form", ["adapted", "base"])
def test_hapos_gradient_is_that_of_its_value(form: str):
    old, logp, advantages, h_hat = random_step()
    batch = batch_of(old, advantages, h_hat=h_hat)

    def value(logp: Tensor) -> Tensor:
        return hapo(PolicyTokens(logp), batch, zone=form).values  # type: ignore[arg-type]

    slope = torch.autograd.grad(value(logp).sum(), logp)[0]
    step = 1e-7
    numeric = (value(logp.detach() + step) - value(logp.detach() - step)) / (2 * step)
    assert_close(slope, numeric, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "control"), [("hapo", "hapo"), ("copo", "copo")])
def test_without_its_control_a_loss_says_which_to_add(name: str, control: str):
    old, logp, advantages, _ = random_step()
    with pytest.raises(ValueError, match=f"add {control} to the recipe's control"):
        POLICY_LOSSES.bind(name)(PolicyTokens(logp), batch_of(old, advantages))


def test_a_row_with_only_a_global_advantage_is_not_idle():
    old = torch.zeros(3, 2).double()
    batch = batch_of(old, f64([[0, 0], [1, 1], [0, 0]]), advantage_global=f64([[0.5, 0.5], [0, 0], [0, 0]]))
    objective = Objective(POLICY_LOSSES.bind("copo"), (), AGGREGATES.bind("seq_mean_token_mean"))
    assert objective.idle_rows(batch).tolist() == [False, False, True]
    logp = old.clone().requires_grad_()
    share = objective(PolicyTokens(logp), batch, StepTotals(6, 3, 2))
    slope = torch.autograd.grad(share.loss, logp)[0]
    assert_close(slope[:, 0], f64([-0.5, -1.0, 0.0]) / 6)
