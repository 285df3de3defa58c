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

ROWS, WIDTH = 9, 7


def batch(seed: int = 0, drift: float = 0.5) -> tuple[Tensor, TrainBatch]:
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
    given = TrainBatch(
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
    return logp.clone().requires_grad_(), given


def evaluate(name: str, logp: Tensor, given: TrainBatch, **hp: float | None) -> TokenLoss:
    return POLICY_LOSSES.bind(name, hp)(PolicyTokens(logp), given)


def gradient(name: str, logp: Tensor, given: TrainBatch, **hp: float | None) -> Tensor:
    return torch.autograd.grad(evaluate(name, logp, given, **hp).values.sum(), logp)[0]


def marked(given: TrainBatch, ratio: float = 0.2) -> TrainBatch:
    return TOKEN_CONTROLS.bind("kl_cov", {"ratio": ratio})(given)


# KL-Cov -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_kl_cov_is_the_ratio_surrogate_plus_the_absolute_log_ratio_where_it_is_marked(beta: float):
    logp, given = batch()
    given = marked(given, 0.6)
    log_r = logp.detach() - given.old_logp
    values = -given.advantages * log_r.exp() + beta * given.extra["kl_cov"] * log_r.abs()
    slope = -given.advantages * log_r.exp() + beta * given.extra["kl_cov"] * log_r.sign()
    assert_close(evaluate("kl_cov", logp, given, beta=beta).values, torch.where(given.mask, values, 0.0))
    assert_close(gradient("kl_cov", logp, given, beta=beta), torch.where(given.mask, slope, 0.0))
    assert given.extra["kl_cov"].any() and (given.extra["kl_cov"][log_r < 0]).any()


def test_nothing_is_clipped_by_kl_cov():
    # r = e^3, A = +1 and -1: PPO stops at 1.2 and, dual, at 3; here the gradient is -A e^3
    _, given = batch()
    far = (given.old_logp + 3.0).requires_grad_()
    given = given.replace(mask=torch.ones(ROWS, WIDTH), logp_now=far.detach()).with_extra(
        kl_cov=torch.zeros(ROWS, WIDTH).double()
    )
    assert_close(gradient("kl_cov", far, given), -given.advantages * math.exp(3.0))


def test_where_the_policy_has_not_moved_a_rounding_error_gets_no_sign():
    # the first update of a step: logp_now is old_logp; the gradient pass's own log-probs differ by an ulp
    # either way
    _, given = batch()
    given = marked(given.replace(logp_now=given.old_logp), 0.5)
    noise = 1e-7 * torch.where(torch.arange(WIDTH) % 2 == 0, 1.0, -1.0)
    logp = (given.old_logp + noise).requires_grad_()
    want = torch.where(given.mask, -given.advantages * noise.exp(), 0.0)
    assert given.extra["kl_cov"].any()
    assert_close(gradient("kl_cov", logp, given), want)
    moved = given.replace(logp_now=given.old_logp + noise)
    assert not torch.allclose(gradient("kl_cov", logp, moved), want)


def test_marks_pull_tokens_without_an_advantage_and_such_rows_are_not_idle():
    logp, given = batch()
    objective = Objective(POLICY_LOSSES.bind("kl_cov"), (), AGGREGATES.bind("token_mean"))
    for mark, idle in ((0.0, True), (1.0, False)):
        one = given.rows([4]).with_extra(kl_cov=torch.full((1, WIDTH), mark).double())
        own = logp.detach()[[4]].requires_grad_()
        assert objective.idle_rows(one).tolist() == [idle]
        assert bool(gradient("kl_cov", own, one).any()) is not idle


def test_without_its_control_kl_cov_says_so():
    logp, given = batch()
    with pytest.raises(ValueError, match="control kl_cov computes"):
        evaluate("kl_cov", logp, given)


def test_the_penalty_is_reported():
    logp, given = batch()
    given = marked(given)
    metric = evaluate("kl_cov", logp, given).metrics["kl_cov_penalty"]
    assert_close(
        metric, given.extra["kl_cov"] * torch.where(given.mask, (logp.detach() - given.old_logp).abs(), 0.0)
    )


# CE-GPPO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_betas_of_zero_give_ppo_s_gradient_and_betas_of_one_ppo_s_values(dual_clip: float | None):
    logp, given = batch(1)
    assert_close(
        gradient("ce_gppo", logp, given, beta1=0.0, beta2=0.0, dual_clip=dual_clip),
        gradient("clip", logp, given, dual_clip=dual_clip),
    )
    assert_close(
        evaluate("ce_gppo", logp, given, beta1=1.0, beta2=1.0, dual_clip=dual_clip).values,
        evaluate("clip", logp, given, dual_clip=dual_clip).values,
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
    _, given = batch()
    now = torch.full((ROWS, WIDTH), math.log(ratio) if ratio > 0 else -400.0).double().requires_grad_()
    zero = torch.zeros(ROWS, WIDTH).double()
    given = given.replace(mask=torch.ones(ROWS, WIDTH), old_logp=zero, advantages=zero + advantage)
    values = evaluate("ce_gppo", now, given, **hp).values
    assert values.isfinite().all()
    return float(torch.autograd.grad(values.sum(), now)[0][0, 0])


def test_a_larger_beta1_pushes_improbable_tokens_harder_and_beta2_only_the_others():
    logp, given = batch(2)
    seen = (logp.detach() - given.old_logp).exp()
    low, high = (
        given.mask & (given.advantages < 0) & (seen < 0.8),
        given.mask & (given.advantages > 0) & (seen > 1.2),
    )
    assert low.any() and high.any()
    base = gradient("ce_gppo", logp, given)
    harder, stronger = (
        gradient("ce_gppo", logp, given, beta1=0.5),
        gradient("ce_gppo", logp, given, beta2=1.5),
    )
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
    logp, given = batch(3)
    given = given.replace(old_logp=logp.detach(), logp_now=logp.detach())
    for control in controls:
        hp = {"low": -0.1, "high": 0.5, "ratio": 0.2} if control == "clip_cov" else {}
        given = apply_control(given, TOKEN_CONTROLS.bind(control, hp))
    assert all((given.weights != 1)[given.mask].any() for _ in controls), "the controls do something"
    totals = StepTotals(*given.totals_of_mask, max_tokens=WIDTH)
    share = Objective(POLICY_LOSSES.bind(name), (), AGGREGATES.bind("token_mean"))(
        PolicyTokens(logp), marked(given), totals
    )
    want = torch.where(given.mask, -given.advantages * given.weights, 0.0) / given.mask.sum()
    assert_close(torch.autograd.grad(share.loss, logp)[0], want)


def test_clip_cov_without_an_eligible_token_is_ppo():
    logp, given = batch(4)
    after = apply_control(given, TOKEN_CONTROLS.bind("clip_cov", {"low": 50.0, "high": 60.0}))
    assert_close(gradient("clip", logp, after), gradient("clip", logp, given))
    assert after.notes["clip_cov_touched"] == after.notes["clip_cov_strength"] == 0


def test_what_a_control_touched_is_counted():
    # KL-Cov marks floor(0.2 N) tokens and changes no weight; Clip-Cov takes whole tokens away
    _, given = batch(5)
    n = int(given.mask.sum())
    assert apply_control(given, TOKEN_CONTROLS.bind("kl_cov", {"ratio": 0.2})).notes[
        "kl_cov_touched"
    ] == pytest.approx(int(0.2 * n) / n)
    after = apply_control(given, TOKEN_CONTROLS.bind("clip_cov", {"low": 0.0, "high": 9.0, "ratio": 0.1}))
    assert (
        after.notes["clip_cov_touched"] == pytest.approx(int(0.1 * n) / n)
        and after.notes["clip_cov_strength"] > 0
    )
