"""STEER, the 80/20 mask, AEPO and DCPO compared with autograd, brute force and numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control import TOKEN_CONTROLS
from rltrain.control.entropy import ABOVE_TARGET, aepo_rows, aepo_temperature, steer_exact, steer_released
from rltrain.control.stage import current_policy_needs, split_by_timing
from rltrain.learner.head import STATISTICS, token_statistics
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_TEMPERED

ROWS = 10
WIDTH = 8


def make_batch(seed: int = 0, tempered: int = 4) -> TrainBatch:
    """A ragged batch with 5 completions per group, the last of them sampled at another temperature, and NaN
    outside the mask.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    draws = torch.rand(5, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    filled = [
        torch.where(mask, values, math.nan)
        for values in (-2 * draws[0], -2 * draws[1], 2 * draws[2], 2 * draws[3])
    ]
    number = torch.arange(ROWS)
    source = torch.where(number % 5 >= 5 - tempered // 2, SOURCE_TEMPERED, SOURCE_POLICY)
    advantages = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64).expand(ROWS, WIDTH)
    return TrainBatch(
        mask=mask,
        advantages=torch.where(mask, advantages, math.nan),
        weights=torch.where(mask, 1.0, math.nan).double(),
        rewards=advantages[:, 0],
        group=number // 5,
        source=source,
        version=number * 0,
        sample=number % 5,
        correct=(number % 3 == 0).double(),
        old_logp=filled[0],
        logp_now=filled[1],
        old_entropy=filled[2],
        entropy_now=filled[3],
        extra={"expected_entropy_slope_now": torch.where(mask, draws[4] - 0.5, math.nan)},
    )


def apply_control(name: str, batch: TrainBatch, **hp: Any) -> TrainBatch:
    return TOKEN_CONTROLS.bind(name, hp)(batch)


def entropy_of(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# STEER ------------------------------------------------------------------------------------------------------


def single_token_batch(logits: Tensor, token: int, advantage: float, old: float) -> TrainBatch:
    """Batch of one token drawn from softmax(logits), whose probability was ``old`` in the old policy."""
    logp = logits.log_softmax(-1)
    ids = torch.zeros(1, dtype=torch.int64)
    slope = STATISTICS["expected_entropy_slope"](logp[None], ids)

    def cell(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).reshape(1, 1)

    return TrainBatch(
        mask=torch.ones(1, 1),
        advantages=cell(advantage),
        weights=cell(1.0),
        rewards=torch.zeros(1),
        group=ids,
        source=ids,
        version=ids,
        old_logp=cell(math.log(old)),
        logp_now=cell(logp[token]),
        old_entropy=cell(entropy_of(logits)),
        entropy_now=cell(entropy_of(logits)),
        extra={"expected_entropy_slope_now": cell(slope)},
    )


@pytest.mark.parametrize("token", range(4))
@pytest.mark.parametrize(("advantage", "old"), [(1.0, 0.3), (-0.7, 0.05)])
def test_the_exact_omega_is_minus_the_entropy_change_of_one_ascent_step(
    token: int, advantage: float, old: float
):
    # autograd: z <- z + eta A d(pi / pi_old)/dz; dH / d eta at eta = 0
    logits = torch.tensor([1.0, 0.5, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    (step,) = torch.autograd.grad(advantage * (logits.log_softmax(-1)[token] - math.log(old)).exp(), logits)
    (slope,) = torch.autograd.grad(entropy_of(logits), logits)
    omega = steer_exact(single_token_batch(logits.detach(), token, advantage, old))
    assert_close(omega.squeeze(), -(slope * step).sum())


def test_the_released_omega_is_the_table_s_and_has_the_exact_one_s_sign():
    # z = [1, .5, -.2, 0], token 0, A = 1, r = 1: exact dH/eta -0.142410, released 0.254358
    # (arXiv:2510.10150's estimate)
    logits = torch.tensor([1.0, 0.5, -0.2, 0.0], dtype=torch.float64)
    batch = single_token_batch(logits, 0, 1.0, float(logits.softmax(-1)[0]))
    assert float(steer_exact(batch)) == pytest.approx(0.142410, abs=1e-6)
    assert float(steer_released(batch)) == pytest.approx(0.254358, abs=1e-6)


def test_released_probabilities_are_bounded_and_what_is_not_finite_is_zero():
    # pi = e^-30 counts as 1e-8, pi = 1 as 1 - 1e-8, pi_old = e^-30 as 1e-8
    def cells(*values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float64)

    batch = make_batch().rows([0], 4).replace(mask=torch.ones(1, 4), weights=cells(1, 1, 1, 1))
    batch = batch.replace(
        advantages=cells(2, 2, 2, math.inf),
        old_logp=cells(-1, -1, -30, -1),
        logp_now=cells(-30, 0, -1, -1),
        old_entropy=cells(1, 1, 2, 1),
    )
    small = 1e-8
    p = math.exp(-1)
    want = [
        2 / p * small * (1 - small) * (math.log(small) + 1),
        2 / p * (1 - small) * small * (math.log1p(-small) + 1),
        2 / small * p * (1 - p) * (-1 + 2),
        0.0,
    ]
    got = steer_released(batch.replace(extra={}))
    assert_close(got, cells(*want), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "hp", [{"form": "linear"}, {}, {"omega": "exact"}, {"form": "linear", "omega": "exact"}]
)
def test_the_largest_omega_has_the_least_weight_and_advantage_zero_the_largest(hp: dict[str, Any]):
    batch = make_batch(1)
    batch = batch.replace(advantages=torch.where(torch.arange(ROWS)[:, None] == 2, 0.0, batch.advantages))
    weights = apply_control("steer", batch, **hp).weights
    omega = (steer_exact if hp.get("omega") == "exact" else steer_released)(batch).abs()
    largest = torch.where(batch.mask, omega, -1.0).argmax()
    assert weights.flatten()[largest] == pytest.approx(0.8) == float(weights[batch.mask].min())
    top = 1.2 if hp.get("form") == "linear" else 1.0
    assert_close(weights[2][batch.mask[2]], torch.full_like(weights[2][batch.mask[2]], top))
    assert float(weights[batch.mask].max()) == pytest.approx(top)
    assert not weights[~batch.mask].any() and not weights.requires_grad


def test_equal_omegas_weigh_half_way_in_the_linear_form_and_least_in_the_exponential():
    batch = make_batch().replace(mask=torch.ones(ROWS, WIDTH))
    unit = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    batch = batch.replace(advantages=unit, weights=unit, old_logp=-unit, logp_now=-unit, old_entropy=2 * unit)
    assert_close(apply_control("steer", batch, form="linear", w_min=0.7, w_max=1.1).weights, 0.9 * unit)
    assert_close(apply_control("steer", batch, lambda_min=0.6).weights, 0.6 * unit)


def test_a_small_omega_is_not_blown_up_by_the_floor_unless_the_paper_s_form_is_asked_for():
    # s = 0.01 on every token: exp(ln 0.8 x 0.01 / 0.02) = sqrt 0.8; without floor 0.8
    batch = make_batch().replace(mask=torch.ones(ROWS, WIDTH))
    unit = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    p = math.exp(-1)
    batch = batch.replace(
        advantages=unit * 0.01 / (1 - p), weights=unit, old_logp=-unit, logp_now=-unit, old_entropy=2 * unit
    )
    assert_close(apply_control("steer", batch).weights, math.sqrt(0.8) * unit)
    assert_close(apply_control("steer", batch, omega_floor=0.0).weights, 0.8 * unit)
    still = batch.replace(advantages=0 * unit)
    assert_close(apply_control("steer", still, omega_floor=0.0).weights, unit)


def test_a_lambda_of_one_is_the_loss_without_steer():
    batch = make_batch(2)
    assert_close(apply_control("steer", batch, lambda_min=1.0).weights[batch.mask], batch.weights[batch.mask])


def test_steer_asks_for_what_its_form_reads_and_runs_once_per_optimizer_batch():
    released = TOKEN_CONTROLS.bind("steer")
    exact = TOKEN_CONTROLS.bind("steer", {"omega": "exact"})
    assert released.needs == {"old_logp", "logp_now", "old_entropy"}
    assert exact.needs == {"old_logp", "logp_now", "entropy_now", "expected_entropy_slope_now"}
    early, later = split_by_timing([released, exact])
    assert (
        early == ()
        and later is not None
        and later.needs == {"logp_now", "entropy_now", "expected_entropy_slope_now"}
    )
    assert current_policy_needs(frozenset({"old_logp", "tempered_logp:1.2"})) == frozenset()


@pytest.mark.parametrize(
    ("hp", "missing"), [({}, "old_entropy"), ({"omega": "exact"}, "entropy_now"), ({}, "logp_now")]
)
def test_what_steer_lacks_is_named(hp: dict[str, Any], missing: str):
    with pytest.raises(ValueError, match=f"control steer needs {missing}"):
        apply_control("steer", make_batch().replace(**{missing: None}), **hp)
    with pytest.raises(ValueError, match="control steer needs expected_entropy_slope_now"):
        apply_control("steer", make_batch().replace(extra={}), omega="exact")


# statistics of the head -------------------------------------------------------------------------------------


def test_the_head_s_statistics_are_their_definitions():
    torch.manual_seed(0)
    hidden = torch.randn(9, 5).double()
    weight = torch.randn(13, 5).double()
    targets = torch.randint(13, (9,))
    wants = frozenset(
        {"expected_entropy_slope", "tempered_logp:1.2", "tempered_logp:0.8", "tempered_logp:1.0", "logp"}
    )
    with torch.no_grad():
        statistics = token_statistics(hidden, weight, targets, temperature=0.7, wants=wants, chunk=4)
    logits = hidden @ weight.t() / 0.7
    p = logits.softmax(-1)
    assert_close(
        statistics["expected_entropy_slope"], (p**2 * (p.log() + entropy_of(logits)[:, None])).sum(-1)
    )
    for temperature in (1.2, 0.8):
        want = (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        assert_close(statistics[f"tempered_logp:{temperature}"], want)
    assert_close(statistics["tempered_logp:1.0"], statistics["logp"])
    uniform = torch.full((2, 13), -math.log(13)).double()
    assert_close(STATISTICS["expected_entropy_slope"](uniform, targets[:2]), torch.zeros(2).double())


# the 80/20 mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_tokens_kept_are_those_at_or_above_the_quantile(share: float):
    batch = make_batch(3)
    after = apply_control("high_entropy_tokens", batch, share=share)
    entropies = batch.old_entropy[batch.mask]
    kept = after.weights[batch.mask] == 1
    assert torch.equal(kept, entropies >= torch.quantile(entropies, 1 - share))
    assert int(kept.sum()) >= max(1, int(share * entropies.numel()))
    assert torch.equal(after.mask, batch.mask), "dropped tokens stay in the denominator"


def test_equal_entropies_keep_every_token():
    batch = make_batch().replace(old_entropy=torch.ones(ROWS, WIDTH, dtype=torch.float64))
    assert (apply_control("high_entropy_tokens", batch).weights[batch.mask] == 1).all()


# AEPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "temperature"), [(0.3, 1.2), (0.5, 1.2), (0.8, 0.8)])
def test_the_temperature_answers_the_entropy_and_a_tie_is_high(entropy: float, temperature: float):
    assert aepo_temperature(entropy, target=0.5, high=1.2, low=0.8) == temperature


@pytest.mark.parametrize(("above", "replaced"), [(False, 40), (True, 20)])
def test_the_released_form_replaces_as_many_rows_as_the_table_says(above: bool, replaced: int):
    # 40 correct tempered rows, cap 60: k = 40, or 40 // 2 with the entropy above its target
    rows = torch.arange(200)
    tempered = rows >= 100
    unit = torch.ones(200, 1)
    batch = TrainBatch(
        mask=unit,
        advantages=torch.where(tempered & (rows % 5 < 2), 1.0, -0.5)[:, None],
        weights=unit,
        rewards=rows.float(),
        group=rows % 100 // 5,
        source=tempered.long(),
        version=rows * 0,
        sample=rows % 5 + 5 * tempered,
    )
    after = aepo_rows(batch, above_target=above, cap=60)
    kept = after.mask.flatten() & tempered
    left = after.mask.flatten() & ~tempered
    assert (int(kept.sum()), int(left.sum())) == (replaced, 100 - replaced)
    assert not left[:replaced].any() and left[replaced:100].all(), (
        "the policy's first rows are the ones that are replaced"
    )
    good = (tempered & (rows % 5 < 2)).nonzero().flatten()
    assert kept.nonzero().flatten().tolist() == good[:replaced].tolist(), "the first of the good ones stay"
    assert (after.advantages[kept] == 1).all()
    assert int(aepo_rows(batch, above_target=above, cap=7).mask.sum()) == 100


def test_without_a_correct_tempered_row_the_step_is_plain_grpo_in_both_forms():
    batch = make_batch(4)
    is_policy = batch.source == SOURCE_POLICY
    wrong = batch.replace(
        correct=torch.zeros(ROWS), advantages=torch.where(is_policy[:, None], batch.advantages, -1.0)
    )
    rows = apply_control("aepo", wrong.with_metrics(**{ABOVE_TARGET: 0.0}), form="rows")
    assert torch.equal(rows.mask, batch.mask & is_policy[:, None]) and torch.equal(
        rows.advantages[is_policy].nan_to_num(), batch.advantages[is_policy].nan_to_num()
    )
    loss, gradient = evaluate(apply_control("aepo", wrong, alpha=3.0), batch)
    plain_loss, plain_gradient = evaluate(
        batch.rows(is_policy.nonzero().flatten()), batch.rows(is_policy.nonzero().flatten())
    )
    assert_close((loss, gradient[is_policy]), (plain_loss, plain_gradient))
    assert not gradient[~is_policy].any()


def evaluate(after: TrainBatch, before: TrainBatch, policy_loss: str = "clip") -> tuple[Tensor, Tensor]:
    """Token-mean loss and its gradient with respect to the current log-probs."""
    logp = before.logp_now.clone().requires_grad_()
    objective = Objective(POLICY_LOSSES.bind(policy_loss), (), AGGREGATES.bind("token_mean"))
    share = objective(PolicyTokens(logp), after, StepTotals(*after.totals_of_mask, max_tokens=WIDTH))
    return share.loss.detach(), torch.autograd.grad(share.loss, logp)[0]


@pytest.mark.parametrize("policy_loss", ["clip", "cispo", "ce_gppo", "reinforce"])
def test_the_explicit_form_adds_alpha_times_reinforce_over_the_tempered_tokens(policy_loss: str):
    # gradient of L(own rows, over their tokens) + alpha / M sum -R log pi, whatever the policy loss, also
    # off-policy
    batch = make_batch(5)
    alpha = 0.3
    is_policy = batch.source == SOURCE_POLICY
    tempered = batch.source == SOURCE_TEMPERED
    _, gradient = evaluate(apply_control("aepo", batch, alpha=alpha), batch, policy_loss)
    part = batch.rows(is_policy.nonzero().flatten())
    assert_close(gradient[is_policy], evaluate(part, part, policy_loss)[1])
    counted = batch.mask & tempered[:, None]
    want = -alpha * batch.correct[:, None] * counted / counted.sum()
    assert_close(gradient[tempered], want[tempered])
    assert want.any()


def test_alpha_zero_and_no_tempered_rows_both_give_the_loss_of_the_policy_s_own_rows():
    batch = make_batch(6)
    policy_rows = (batch.source == SOURCE_POLICY).nonzero().flatten()
    policy_batch = batch.rows(policy_rows)
    want = evaluate(policy_batch, policy_batch)
    loss, gradient = evaluate(apply_control("aepo", batch, alpha=0.0), batch)
    assert_close((loss, gradient[policy_rows]), want)
    assert_close(evaluate(apply_control("aepo", policy_batch, alpha=0.5), policy_batch), want)


def test_expected_reinforce_on_tempered_samples_moves_the_entropy_towards_the_temperature():
    # E_{a ~ pi_T}[grad ln pi(a)] = pi_T - pi: dH/d eta is 0.025559 at T = 1.2, -0.033307 at 0.8 and 0 at 1
    # for p = [.7, .2, .1]
    logits = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().requires_grad_()
    for temperature, want in ((1.2, 0.025559), (0.8, -0.033307), (1.0, 0.0)):
        tempered = (logits.detach() / temperature).softmax(-1)
        (step,) = torch.autograd.grad((tempered * logits.log_softmax(-1)).sum(), logits)
        assert_close(step, tempered - logits.softmax(-1).detach())
        (slope,) = torch.autograd.grad(entropy_of(logits), logits)
        assert float((slope * step).sum()) == pytest.approx(want, abs=1e-6)


def test_the_rows_form_needs_to_be_told_where_the_entropy_was():
    with pytest.raises(ValueError, match="needs the note aepo_above_target"):
        apply_control("aepo", make_batch(), form="rows")
    assert TOKEN_CONTROLS.bind("aepo", {"form": "rows"}).needs == frozenset(), (
        "k is counted over the whole step"
    )
    assert TOKEN_CONTROLS.bind("aepo").needs == {"logp_now"}, (
        "parts have the token counts of their optimizer batch"
    )


# DCPO -------------------------------------------------------------------------------------------------------


def with_tempered_logp(batch: TrainBatch) -> TrainBatch:
    shifted = {f"tempered_logp:{t}": batch.old_logp + shift for t, shift in ((1.2, 0.1), (0.8, -0.2))}
    return batch.with_extra(**shifted)


@pytest.mark.parametrize(("target", "shift"), [(5.0, 0.1), (0.01, -0.2)])
def test_dcpo_mixes_correctness_times_the_tempered_ratio_into_the_advantages(target: float, shift: float):
    # |target - H| is above the cap: b = 0.1 / f
    batch = with_tempered_logp(make_batch(7, tempered=0))
    after = apply_control("dcpo", batch, target=target)
    b = 0.1 / float((batch.correct == 1).float().mean())
    mix = b / (1 + b)
    want = (1 - mix) * batch.advantages + mix * batch.correct[:, None] * math.exp(shift)
    assert_close(after.advantages[batch.mask], want[batch.mask])
    assert after.notes["dcpo_mix"] == pytest.approx(mix)


def test_dcpo_without_a_correct_sample_or_at_its_target_changes_nothing():
    batch = with_tempered_logp(make_batch(8, tempered=0))
    level = float(batch.old_entropy[batch.mask].mean())
    for case, target in ((batch.replace(correct=torch.zeros(ROWS)), 0.5), (batch, level)):
        assert_close(
            apply_control("dcpo", case, target=target).advantages[batch.mask], batch.advantages[batch.mask]
        )


def test_dcpo_asks_for_its_own_temperatures():
    needs = TOKEN_CONTROLS.bind("dcpo", {"high": 1.5}).needs
    assert {"tempered_logp:1.5", "tempered_logp:0.8"} <= needs and not current_policy_needs(needs)
    with pytest.raises(ValueError, match=r"control dcpo needs tempered_logp:1.2"):
        apply_control("dcpo", make_batch(), target=9.0)
