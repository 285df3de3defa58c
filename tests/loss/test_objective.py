from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.registry import BoundMethod
from rltrain.types.policy import PolicyTokens, StepTotals, TokenLoss, TrainBatch

# losses of the advantage alone; those that read a control's marks, or no reward, have tests of their own
PLAIN = [
    name
    for name, spec in POLICY_LOSSES.specs.items()
    if not {"reward_free", "acts_everywhere"} & spec.traits
    and not any(trait.startswith("control:") for trait in spec.traits)
]


def objective(
    policy: str = "clip", aggregate: str = "token_mean", **terms: float | Callable[[], float]
) -> Objective:
    return Objective(
        POLICY_LOSSES.bind(policy),
        tuple(Term(name, LOSS_TERMS.bind(name), coefficient) for name, coefficient in terms.items()),
        AGGREGATES.bind(aggregate),
    )


def step() -> tuple[PolicyTokens, TrainBatch, StepTotals]:
    """4 rows: full, A = 0, weight 0, and empty. Advantages of the last are not 0."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(4, dtype=torch.int64)
    old, ref, noise = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    batch = TrainBatch(
        mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]),
        advantages=torch.tensor([[1.0] * 3, [0.0] * 3, [-1.0] * 3, [2.0] * 3], dtype=torch.float64),
        weights=torch.tensor([[1.0, 2.0, 0.5], [1.0] * 3, [0.0] * 3, [1.0] * 3], dtype=torch.float64),
        rewards=rows.double(),
        group=rows,
        source=rows,
        version=rows,
        old_logp=old,
        ref_logp=ref,
    )
    logp = (old + 0.05 * noise).requires_grad_()
    return (
        PolicyTokens(logp, torch.rand(4, 3, generator=generator, dtype=torch.float64).requires_grad_()),
        batch,
        StepTotals(6, 3, 3),
    )


def gradient(share: Tensor, logp: Tensor) -> Tensor:
    return torch.autograd.grad(share, logp, retain_graph=True)[0]


def test_the_loss_is_weights_times_policy_plus_coefficients_times_terms():
    policy, batch, totals = step()
    share = objective(kl=0.1, entropy=0.01)(policy, batch, totals)
    r = (policy.logp - batch.old_logp).exp()
    d = batch.ref_logp - policy.logp
    assert ((r > 0.8) & (r < 1.2)).all(), "nothing clips in this batch"
    per_token = -batch.advantages * r * batch.weights + 0.1 * (d.exp() - d - 1) - 0.01 * policy.entropy
    assert_close(share.loss, per_token[batch.mask].sum() / 6)


def test_sequence_values_are_weighed_token_by_token():
    policy, batch, totals = step()
    share = objective("gspo", "seq_mean_token_mean")(policy, batch, totals)
    values = POLICY_LOSSES.bind("gspo")(policy, batch).values.flatten()
    # row 1: mean weight (1 + 2 + 0.5) / 3; row 2 has A = 0, row 3 weight 0; 3 sequences count
    assert_close(share.loss, values[0] * 3.5 / 3 / 3)


def test_without_old_logp_the_ratio_is_exactly_one():
    policy, batch, totals = step()
    share = objective()(policy, batch.replace(old_logp=None), totals)
    # sum of -A w over tokens: -(1 + 2 + 0.5), row 3 has weight 0
    assert share.loss.item() == -3.5 / 6
    assert share.metrics["loss/approx_kl"].item() == 0
    assert_close(gradient(share.loss, policy.logp)[0], -batch.weights[0] / 6)


def test_metrics_are_detached_token_means():
    policy, batch, totals = step()
    metrics = objective(kl=0.1, entropy=0.01)(policy, batch, totals).metrics
    assert set(metrics) == {
        "loss/policy",
        "loss/approx_kl",
        "loss/clip_high",
        "loss/clip_low",
        "loss/kl",
        "loss/entropy",
    }
    assert not any(value.requires_grad or value.dim() for value in metrics.values())
    assert_close(metrics["loss/entropy"], -policy.entropy.detach()[batch.mask].mean())


@pytest.mark.parametrize("policy_loss", PLAIN)
@pytest.mark.parametrize("aggregate", AGGREGATES.names())
def test_nan_in_padding_leaks_into_neither_loss_nor_gradient(policy_loss: str, aggregate: str):
    policy, batch, totals = step()
    with_terms = objective(policy_loss, aggregate, kl=0.1, entropy=0.01)
    clean = with_terms(policy, batch, totals)

    def spoil(values: Tensor) -> Tensor:
        return torch.where(batch.mask, values.detach(), math.nan)

    bad_policy = PolicyTokens(spoil(policy.logp).requires_grad_(), spoil(policy.entropy).requires_grad_())
    fields = {name: spoil(getattr(batch, name)) for name in ("advantages", "weights", "old_logp", "ref_logp")}
    bad = with_terms(bad_policy, batch.replace(**fields), totals)
    assert torch.equal(bad.loss, clean.loss)
    assert torch.equal(gradient(bad.loss, bad_policy.logp), gradient(clean.loss, policy.logp))
    assert torch.equal(gradient(bad.loss, bad_policy.entropy), gradient(clean.loss, policy.entropy))
    assert all(torch.equal(bad.metrics[name], clean.metrics[name]) for name in clean.metrics)


@pytest.mark.parametrize(
    "careless", [lambda p, b: -b.advantages * p.logp, lambda p, b: (p.logp - b.old_logp).exp() * b.advantages]
)
def test_a_loss_that_forgets_the_mask_is_still_safe(careless: Callable[[PolicyTokens, TrainBatch], Tensor]):
    # the objective guards its borders: a new method needs no NaN handling of its own for per-token formulas
    policy, batch, totals = step()
    logp = torch.where(batch.mask, policy.logp.detach(), math.nan).requires_grad_()
    spec = POLICY_LOSSES.spec("reinforce")
    loss = Objective(
        BoundMethod(spec, {}, lambda p, b: TokenLoss(careless(p, b))), (), AGGREGATES.bind("token_mean")
    )
    share = loss(
        PolicyTokens(logp), batch.replace(old_logp=torch.where(batch.mask, batch.old_logp, math.nan)), totals
    )
    assert share.loss.isfinite() and gradient(share.loss, logp).isfinite().all()


def test_needs_are_the_union_of_what_is_switched_on():
    assert objective().needs == {"old_logp"}
    assert objective(kl=0.1, entropy=lambda: 0.0).needs == {"old_logp", "ref_logp", "entropy_grad"}
    assert objective("reinforce", kl=0.0).needs == frozenset()


def test_a_term_with_coefficient_zero_is_not_evaluated():
    policy, batch, totals = step()
    share = objective(kl=0.0)(policy, batch.replace(ref_logp=None), totals)
    assert "loss/kl" not in share.metrics


def test_a_controller_is_asked_at_every_call():
    policy, batch, totals = step()
    values = iter([0.0, 1.0])
    controlled = objective("reinforce", entropy=lambda: next(values))
    off = controlled(policy, batch, totals).loss
    on = controlled(policy, batch, totals).loss
    assert_close(off - on, policy.entropy[batch.mask].mean())


@pytest.mark.parametrize("policy_loss", PLAIN)
def test_idle_rows_are_those_without_gradient(policy_loss: str):
    policy, batch, totals = step()
    idle = objective(policy_loss).idle_rows(batch)
    assert idle.tolist() == [False, True, True, True]
    on_policy = batch.replace(old_logp=None)  # nothing clips
    slope = gradient(objective(policy_loss)(policy, on_policy, totals).loss, policy.logp)
    assert torch.equal(~slope.any(dim=1), idle)


def test_with_a_term_on_only_empty_rows_are_idle():
    _, batch, _ = step()
    assert objective(kl=0.1).idle_rows(batch).tolist() == [False, False, False, True]
    assert (
        objective(kl=0.0).idle_rows(batch).tolist()
        == objective(kl=lambda: 0.0).idle_rows(batch).tolist()
        == [False, True, True, True]
    )


def test_a_row_whose_zeros_never_meet_is_idle_for_token_losses_only():
    # A = [1, 0], w = [0, 1]: every product is 0, but GSPO spreads the mean advantage 0.5 over both tokens
    policy, batch, _ = step()
    batch = batch.rows([1], 2).replace(
        advantages=torch.tensor([[1.0, 0.0]]).double(), weights=torch.tensor([[0.0, 1.0]]).double()
    )
    single_row = PolicyTokens(policy.logp[[1], :2])
    for name, idle in (("clip", True), ("gspo", False)):
        assert objective(name).idle_rows(batch).tolist() == [idle]
        share = objective(name)(single_row, batch.replace(old_logp=None), StepTotals(2, 1, 2))
        slope = gradient(share.loss, single_row.logp)
        assert bool(slope.any()) is not idle


def test_an_advantage_that_is_nan_is_never_idle():
    _, batch, _ = step()
    spoiled = batch.replace(advantages=torch.full_like(batch.advantages, math.nan))
    assert objective().idle_rows(spoiled).tolist() == [False, False, True, True]
