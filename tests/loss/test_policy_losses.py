from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

PLAIN = [name for name, spec in POLICY_LOSSES.specs.items() if "reward_free" not in spec.traits]
WITHOUT_ADVANTAGE = [name for name in PLAIN if "acts_everywhere" in POLICY_LOSSES.spec(name).traits]
RATIO_LOSSES = [name for name in PLAIN if "old_logp" in POLICY_LOSSES.spec(name).needs]
# what controls hand to losses; 0: they found nothing to do
FROM_CONTROLS = (
    "kl_cov",
    "h_hat",
    "advantage_global",
)
SEQUENCE_LOSSES = [name for name in PLAIN if "sequence_level" in POLICY_LOSSES.spec(name).traits]


def batch_of(old: Tensor, advantages: Tensor, mask: Tensor | None = None) -> TrainBatch:
    rows = torch.zeros(old.shape[0], dtype=torch.int64)
    return TrainBatch(
        mask=torch.ones_like(old) if mask is None else mask,
        advantages=advantages,
        weights=torch.ones_like(old),
        rewards=rows.to(old.dtype),
        group=rows,
        source=rows,
        version=rows,
        old_logp=old,
        ref_logp=old,
        extra={name: torch.zeros_like(old) for name in FROM_CONTROLS},
    )


def random_batch(seed: int = 0) -> tuple[Tensor, TrainBatch]:
    """Current log-probs (with gradient) 0.3 nats around the old ones; one advantage per row, lengths
    1 to 6.
    """
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, 6, generator=generator, dtype=torch.float64) * 3 - 0.5
    logp = old + 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    advantages = (
        torch.tensor([1.5, -0.7, 0.0, 0.4, -2.0, -0.3], dtype=torch.float64)[:, None]
        .expand(6, 6)
        .contiguous()
    )
    mask = torch.arange(6) < torch.tensor([6, 4, 5, 1, 3, 6])[:, None]
    return logp.requires_grad_(), batch_of(old, advantages, mask)


def evaluate(name: str, logp: Tensor, batch: TrainBatch, hp: Mapping[str, Any] | None = None) -> TokenLoss:
    return POLICY_LOSSES.bind(name, hp)(PolicyTokens(logp), batch)


def gradient(name: str, logp: Tensor, batch: TrainBatch, hp: Mapping[str, Any] | None = None) -> Tensor:
    """d/d logp of the loss with every sequence weighing the same: one form for token and sequence losses."""
    values = evaluate(name, logp, batch, hp).values.expand(batch.mask.shape)
    per_row = torch.where(batch.mask, values, 0.0).sum(1) / batch.mask.sum(1)
    return torch.autograd.grad(per_row.sum(), logp)[0]


def one_token(ratio: float, advantage: float) -> tuple[Tensor, TrainBatch]:
    logp = torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    return logp, batch_of(
        torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in WITHOUT_ADVANTAGE])
def test_a_token_with_advantage_zero_has_gradient_zero(name: str):
    # what lets the learner skip rows whose advantages are all 0
    logp, batch = random_batch()
    assert not gradient(name, logp, batch.replace(advantages=torch.zeros_like(batch.advantages))).any()
    assert not gradient(name, logp, batch)[2].any()


# a_star_po is a regression, and luspo weighs a sequence by its length
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("a_star_po", "luspo")])
def test_at_ratio_one_the_gradient_is_reinforce(name: str):
    # section 12.4 of the specification: d/d logp = -A / |y| on every token
    logp, batch = random_batch()
    batch = batch.replace(old_logp=logp.detach())
    want = torch.where(batch.mask, -batch.advantages / batch.mask.sum(1, keepdim=True), 0.0)
    assert_close(gradient(name, logp, batch), want)
    assert_close(gradient("reinforce", logp, batch), want)


@pytest.mark.parametrize("name", ["clip", "gspo", "gmpo"])
def test_at_ratio_one_the_value_is_minus_the_advantage(name: str):
    logp, batch = random_batch()
    values = evaluate(name, logp, batch.replace(old_logp=logp.detach())).values.expand(batch.mask.shape)
    assert_close(values[batch.mask], -batch.advantages[batch.mask])


@pytest.mark.parametrize(
    "name", [name for name in PLAIN if name not in ("ce_gppo", "dppo", "vespo")]
)  # whose values are made for their gradients, not the other way; known answers have those
def test_the_gradient_agrees_with_finite_differences(name: str):
    # CISPO's weight is detached: freeze it by differencing -w A logp instead of the value
    logp, batch = random_batch(3)
    if name == "cispo":
        r = (logp.detach() - batch.old_logp).exp()
        want = torch.where(
            batch.mask, -r.clamp(max=5.0) * batch.advantages / batch.mask.sum(1, keepdim=True), 0.0
        )
        assert_close(gradient(name, logp, batch), want)
        return

    def total(logp: Tensor) -> Tensor:
        values = evaluate(name, logp, batch).values.expand(batch.mask.shape)
        return (torch.where(batch.mask, values, 0.0).sum(1) / batch.mask.sum(1)).sum()

    assert torch.autograd.gradcheck(total, (logp,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_padding_reaches_neither_value_nor_gradient(name: str):
    logp, batch = random_batch(1)
    poison = torch.full_like(batch.weights, math.nan)
    spoiled = {
        key: torch.where(batch.mask, getattr(batch, key), poison) for key in ("old_logp", "advantages")
    }
    bad_logp = torch.where(batch.mask, logp.detach(), poison).requires_grad_()
    assert_close(gradient(name, bad_logp, batch.replace(**spoiled)), gradient(name, logp, batch))
    for metric in evaluate(name, bad_logp, batch.replace(**spoiled)).metrics.values():
        assert metric.isfinite().all()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_keep_the_dtype_and_metrics_are_detached(name: str, dtype: torch.dtype):
    logp, batch = random_batch()
    batch = batch.replace(
        **{key: getattr(batch, key).to(dtype) for key in ("old_logp", "ref_logp", "advantages", "weights")}
    )
    batch = batch.with_extra(**{key: value.to(dtype) for key, value in batch.extra.items()})
    loss = evaluate(name, logp.detach().to(dtype).requires_grad_(), batch)
    assert loss.values.dtype == dtype and loss.values.requires_grad
    assert all(metric.dtype == dtype and not metric.requires_grad for metric in loss.metrics.values())


@pytest.mark.parametrize("name", PLAIN)
def test_only_sequence_level_losses_return_one_value_per_row(name: str):
    logp, batch = random_batch()
    assert evaluate(name, logp, batch).values.shape == ((6, 1) if name in SEQUENCE_LOSSES else (6, 6))


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_a_ratio_without_old_logp_is_refused(name: str):
    logp, batch = random_batch()
    with pytest.raises(ValueError, match="old_logp, which the batch lacks"):
        evaluate(name, logp, batch.replace(old_logp=None))


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_approx_kl_is_k3_of_old_against_new(name: str):
    logp, batch = random_batch()
    r = (logp.detach() - batch.old_logp).exp()
    assert_close(evaluate(name, logp, batch).metrics["approx_kl"][batch.mask], (r - 1 - r.log())[batch.mask])


@pytest.mark.parametrize(
    ("further", "advantage", "value"), [((1.5, 30.0), 1.0, -1.28), ((0.7, 0.01), -1.0, 0.8)]
)
def test_moving_a_clipped_ratio_further_out_changes_nothing(
    further: tuple[float, float], advantage: float, value: float
):
    for ratio in further:
        logp, batch = one_token(ratio, advantage)
        assert_close(evaluate("clip", logp, batch, {"eps_high": 0.28}).values.item(), value)
        assert gradient("clip", logp, batch, {"eps_high": 0.28}).item() == 0


@pytest.mark.parametrize("hp", [{"dual_clip": 3.0}, {"delta": 3.0}])
def test_dual_clip_bounds_the_loss_of_a_negative_token(hp: dict[str, float]):
    # A = -2, c = 3: value 6 and no gradient beyond r = 3; r = 2.9 is untouched: value 5.8, gradient -A r =
    # 5.8
    for ratio, value, slope in [(3.1, 6.0, 0.0), (50.0, 6.0, 0.0), (2.9, 5.8, 5.8)]:
        logp, batch = one_token(ratio, -2.0)
        loss = evaluate("clip", logp, batch, hp)
        assert_close(loss.values.item(), value)
        assert_close(gradient("clip", logp, batch, hp).item(), slope)
        assert loss.metrics["clip_dual"].item() == (ratio > 3)


def test_clip_counts_only_tokens_that_lose_their_gradient():
    # r > 1 + eps counts for A > 0 alone, r < 1 - eps for A < 0 alone
    ratios = [1.5, 1.5, 0.5, 0.5, 1.5]
    advantages = [1.0, -1.0, 1.0, -1.0, 0.0]
    logp = torch.tensor([ratios]).log().requires_grad_()
    batch = batch_of(torch.zeros(1, 5), torch.tensor([advantages]))
    metrics = evaluate("clip", logp, batch).metrics
    assert metrics["clip_high"].tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert metrics["clip_low"].tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]
    lost = (gradient("clip", logp, batch) == 0) & (batch.advantages != 0)
    assert torch.equal(lost, (metrics["clip_high"] + metrics["clip_low"]).bool())


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_permuting_log_ratios_inside_a_sequence_changes_nothing(name: str):
    logp, batch = random_batch(5)
    order = torch.tensor([2, 0, 1, 3, 4, 5])  # within the 3 tokens or more of rows 0, 1, 2, 4, 5
    rows = torch.tensor([0, 1, 2, 4, 5])
    moved = batch.old_logp[rows][:, order]
    mixed = batch.rows(rows).replace(old_logp=moved, ref_logp=moved)
    assert_close(evaluate(name, logp[rows][:, order], mixed).values, evaluate(name, logp, batch).values[rows])


def test_gspo_defaults_clip_what_ppo_would_not():
    # s = 1.0005 > 1 + 4e-4
    logp, batch = one_token(1.0005, 1.0)
    assert gradient("gspo", logp, batch).item() == 0
    assert gradient("clip", logp, batch).item() != 0


def test_gspo_equals_its_token_form():
    # verl's token variant: ln s_t = sg[ln s] + lp - sg[lp], clipped per token, mean per sequence
    logp, batch = random_batch(6)
    hp = {"eps_low": 0.05, "eps_high": 0.1}
    mean = torch.where(batch.mask, logp - batch.old_logp, 0.0).sum(1, keepdim=True) / batch.mask.sum(
        1, keepdim=True
    )
    s = (mean.detach() + logp - logp.detach()).exp()
    token = torch.maximum(-batch.advantages * s, -batch.advantages * s.clamp(0.95, 1.1))
    want = torch.autograd.grad((torch.where(batch.mask, token, 0.0).sum(1) / batch.mask.sum(1)).sum(), logp)[
        0
    ]
    assert_close(gradient("gspo", logp, batch, hp), want)


@pytest.mark.parametrize(
    ("hp", "bounds"), [({}, (0.0, 5.0)), ({"convention": "relative", "eps_high": 0.3}, (0.8, 1.3))]
)
def test_cispo_keeps_a_gradient_on_every_token(hp: dict[str, Any], bounds: tuple[float, float]):
    # gradient = -clip(r) A, far outside of the bounds too
    for ratio in (0.01, 1.0, 200.0):
        logp, batch = one_token(ratio, -1.5)
        assert_close(gradient("cispo", logp, batch, hp).item(), 1.5 * min(max(ratio, bounds[0]), bounds[1]))


def test_gmpo_clips_only_where_the_ratio_moved_with_the_advantage():
    # ln r = 1 beyond 0.4: bounded for A > 0 (rho = e^0.4, no gradient), free for A < 0 (rho = e)
    logp, batch = one_token(math.e, 1.0)
    assert_close(evaluate("gmpo", logp, batch).values.item(), -math.exp(0.4))
    assert gradient("gmpo", logp, batch).item() == 0
    logp, batch = one_token(math.e, -1.0)
    assert_close(evaluate("gmpo", logp, batch).values.item(), math.e)
    assert_close(gradient("gmpo", logp, batch).item(), math.e)


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_a_wild_ratio_stays_finite_in_float32(name: str):
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    for advantage in (1.0, -1.0):
        batch = batch_of(torch.tensor([[-120.0, -120.0]]), torch.full((1, 2), advantage))
        if name == "gmpo" and advantage < 0:
            continue  # unbounded by design: the paper has no cap, the learner skips a non-finite update
        assert evaluate(name, logp, batch).values.isfinite().all()
        assert gradient(name, logp, batch).isfinite().all()
