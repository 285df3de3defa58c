"""KL-Cov and CE-GPPO: gradients by hand and against PPO, what the first update of a step does, and
overflow.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control import TOKEN_CONTROLS
from rltrain.control.stage import apply_control
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, StepTotals, TokenLoss, TrainBatch

ROWS = 9
WIDTH = 7


def make_batch(seed: int = 0, drift: float = 0.5) -> tuple[Tensor, TrainBatch]:
    """Current log-probs with gradient; 3 completions a group; every ninth token still as the old
    policy has it.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    old = -3 * torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    logp = old + drift * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    logp = torch.where(torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 9 == 0, old, logp)
    number = torch.arange(ROWS)
    advantages = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64).expand(ROWS, WIDTH).clone()
    advantages[4] = 0.0
    batch = TrainBatch(
        mask=mask,
        advantages=advantages,
        weights=torch.ones_like(old),
        rewards=advantages[:, 0],
        group=number // 3,
        source=number * 0,
        version=number * 0,
        sample=number % 3,
        old_logp=old,
        logp_now=logp,
        old_entropy=torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64),
    )
    return logp.clone().requires_grad_(), batch


def evaluate(name: str, logp: Tensor, batch: TrainBatch, **hp: float | None) -> TokenLoss:
    return POLICY_LOSSES.bind(name, hp)(PolicyTokens(logp), batch)


def gradient(name: str, logp: Tensor, batch: TrainBatch, **hp: float | None) -> Tensor:
    return torch.autograd.grad(evaluate(name, logp, batch, **hp).values.sum(), logp)[0]


def mark_tokens(batch: TrainBatch, ratio: float = 0.2) -> TrainBatch:
    return TOKEN_CONTROLS.bind("kl_cov", {"ratio": ratio})(batch)


# KL-Cov -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_kl_cov_is_the_ratio_surrogate_plus_the_absolute_log_ratio_where_it_is_marked(beta: float):
    logp, batch = make_batch()
    batch = mark_tokens(batch, 0.6)
    log_r = logp.detach() - batch.old_logp
    values = -batch.advantages * log_r.exp() + beta * batch.extra["kl_cov"] * log_r.abs()
    slope = -batch.advantages * log_r.exp() + beta * batch.extra["kl_cov"] * log_r.sign()
    assert_close(evaluate("kl_cov", logp, batch, beta=beta).values, torch.where(batch.mask, values, 0.0))
    assert_close(gradient("kl_cov", logp, batch, beta=beta), torch.where(batch.mask, slope, 0.0))
    assert batch.extra["kl_cov"].any() and (batch.extra["kl_cov"][log_r < 0]).any()


def test_nothing_is_clipped_by_kl_cov():
    # r = e^3, A = +1 and -1: PPO stops at 1.2 and, dual, at 3; here the gradient is -A e^3
    _, batch = make_batch()
    far = (batch.old_logp + 3.0).requires_grad_()
    batch = batch.replace(mask=torch.ones(ROWS, WIDTH), logp_now=far.detach()).with_extra(
        kl_cov=torch.zeros(ROWS, WIDTH).double()
    )
    assert_close(gradient("kl_cov", far, batch), -batch.advantages * math.exp(3.0))


def test_where_the_policy_has_not_moved_a_rounding_error_gets_no_sign():
    # the first update of a step: logp_now is old_logp; the gradient pass's own log-probs differ by an ulp
    # either way
    _, batch = make_batch()
    batch = mark_tokens(batch.replace(logp_now=batch.old_logp), 0.5)
    noise = 1e-7 * torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    logp = (batch.old_logp + noise).requires_grad_()
    want = torch.where(batch.mask, -batch.advantages * noise.exp(), 0.0)
    assert batch.extra["kl_cov"].any()
    assert_close(gradient("kl_cov", logp, batch), want)
    moved = batch.replace(logp_now=batch.old_logp + noise)
    assert not torch.allclose(gradient("kl_cov", logp, moved), want)


def test_marks_pull_tokens_without_an_advantage_and_such_rows_are_not_idle():
    logp, batch = make_batch()
    objective = Objective(POLICY_LOSSES.bind("kl_cov"), (), AGGREGATES.bind("token_mean"))
    for mark, idle in ((0.0, True), (1.0, False)):
        row = batch.rows([4]).with_extra(kl_cov=torch.full((1, WIDTH), mark).double())
        row_logp = logp.detach()[[4]].requires_grad_()
        assert objective.idle_rows(row).tolist() == [idle]
        assert bool(gradient("kl_cov", row_logp, row).any()) is not idle


def test_without_its_control_kl_cov_says_so():
    logp, batch = make_batch()
    with pytest.raises(ValueError, match="control kl_cov computes"):
        evaluate("kl_cov", logp, batch)


def test_the_penalty_is_reported():
    logp, batch = make_batch()
    batch = mark_tokens(batch)
    metric = evaluate("kl_cov", logp, batch).metrics["kl_cov_penalty"]
    assert_close(
        metric, batch.extra["kl_cov"] * torch.where(batch.mask, (logp.detach() - batch.old_logp).abs(), 0.0)
    )


# CE-GPPO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_betas_of_zero_give_ppo_s_gradient_and_betas_of_one_ppo_s_values(dual_clip: float | None):
    logp, batch = make_batch(1)
    assert_close(
        gradient("ce_gppo", logp, batch, beta1=0.0, beta2=0.0, dual_clip=dual_clip),
        gradient("clip", logp, batch, dual_clip=dual_clip),
    )
    assert_close(
        evaluate("ce_gppo", logp, batch, beta1=1.0, beta2=1.0, dual_clip=dual_clip).values,
        evaluate("clip", logp, batch, dual_clip=dual_clip).values,
    )


def test_the_gradient_of_a_clipped_token_does_not_depend_on_how_far_out_it_is():
    # A = -1 below 0.8: beta1 x 0.8 = 0.2; A = +1 above 1.2: -beta2 x 1.2 = -1.2
    for ratio in (0.79, 0.4, 1e-3, 1e-12, 0.0):
        assert_close(slope_at(ratio, -1.0), 0.2)
    for ratio in (1.21, 2.0, 1e6, 1e30):
        assert_close(slope_at(ratio, 1.0), -1.2)


def test_inside_the_range_the_gradient_is_the_ratio_and_beyond_the_dual_bound_nothing():
    for ratio, advantage, want in (
        (0.81, -1.0, 0.81),
        (1.19, 1.0, -1.19),
        (0.5, 1.0, -0.5),
        (2.0, -1.0, 2.0),
        (3.1, -1.0, 0.0),
    ):
        assert_close(slope_at(ratio, advantage), want)
    assert_close(slope_at(3.1, -1.0, dual_clip=None), 3.1)
    assert_close(slope_at(9.0, -1.0, dual_clip=10.0), 9.0)


def slope_at(ratio: float, advantage: float, **hp: float | None) -> float:
    _, batch = make_batch()
    now = torch.full((ROWS, WIDTH), math.log(ratio) if ratio > 0 else -400.0).double().requires_grad_()
    zero = torch.zeros(ROWS, WIDTH).double()
    batch = batch.replace(mask=torch.ones(ROWS, WIDTH), old_logp=zero, advantages=zero + advantage)
    values = evaluate("ce_gppo", now, batch, **hp).values
    assert values.isfinite().all()
    return float(torch.autograd.grad(values.sum(), now)[0][0, 0])


def test_a_larger_beta1_pushes_improbable_tokens_harder_and_beta2_only_the_others():
    logp, batch = make_batch(2)
    ratio = (logp.detach() - batch.old_logp).exp()
    low = batch.mask & (batch.advantages < 0) & (ratio < 0.8)
    high = batch.mask & (batch.advantages > 0) & (ratio > 1.2)
    assert low.any() and high.any()
    base = gradient("ce_gppo", logp, batch)
    harder = gradient("ce_gppo", logp, batch, beta1=0.5)
    stronger = gradient("ce_gppo", logp, batch, beta2=1.5)
    assert_close(harder, torch.where(low, 2 * base, base))
    assert_close(stronger, torch.where(high, 1.5 * base, base))


# every method of this file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_cov", "ce_gppo", "clip"])
@pytest.mark.parametrize(
    "controls",
    [[], ["clip_cov"], ["steer"], ["high_entropy_tokens"], ["clip_cov", "steer", "high_entropy_tokens"]],
)
def test_at_the_first_update_the_gradient_is_weighted_reinforce(name: str, controls: list[str]):
    # with lp_old = lp: -A w / N on every token, w the controls' own weights (Clip-Cov's dropped tokens have
    # none)
    logp, batch = make_batch(3)
    batch = batch.replace(old_logp=logp.detach(), logp_now=logp.detach())
    for control in controls:
        hp = {"low": -0.1, "high": 0.5, "ratio": 0.2} if control == "clip_cov" else {}
        batch = apply_control(batch, TOKEN_CONTROLS.bind(control, hp))
    assert all((batch.weights != 1)[batch.mask].any() for _ in controls), "the controls do something"
    totals = StepTotals(*batch.totals_of_mask, max_tokens=WIDTH)
    share = Objective(POLICY_LOSSES.bind(name), (), AGGREGATES.bind("token_mean"))(
        PolicyTokens(logp), mark_tokens(batch), totals
    )
    want = torch.where(batch.mask, -batch.advantages * batch.weights, 0.0) / batch.mask.sum()
    assert_close(torch.autograd.grad(share.loss, logp)[0], want)


def test_clip_cov_without_an_eligible_token_is_ppo():
    logp, batch = make_batch(4)
    after = apply_control(batch, TOKEN_CONTROLS.bind("clip_cov", {"low": 50.0, "high": 60.0}))
    assert_close(gradient("clip", logp, after), gradient("clip", logp, batch))
    assert after.notes["clip_cov_touched"] == after.notes["clip_cov_strength"] == 0


def test_what_a_control_touched_is_counted():
    # KL-Cov marks floor(0.2 N) tokens and changes no weight; Clip-Cov takes whole tokens away
    _, batch = make_batch(5)
    n = int(batch.mask.sum())
    assert apply_control(batch, TOKEN_CONTROLS.bind("kl_cov", {"ratio": 0.2})).notes[
        "kl_cov_touched"
    ] == pytest.approx(int(0.2 * n) / n)
    after = apply_control(batch, TOKEN_CONTROLS.bind("clip_cov", {"low": 0.0, "high": 9.0, "ratio": 0.1}))
    assert (
        after.notes["clip_cov_touched"] == pytest.approx(int(0.1 * n) / n)
        and after.notes["clip_cov_strength"] > 0
    )
