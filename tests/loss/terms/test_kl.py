from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.loss import LOSS_TERMS
from rltrain.types.policy import PolicyTokens, TrainBatch

ESTIMATORS = ["k2", "k3", "k1_plus", "k3_plus"]


def batch_of(ref: Tensor, mask: Tensor | None = None, old: Tensor | None = None) -> TrainBatch:
    rows = torch.zeros(ref.shape[0], dtype=torch.int64)
    return TrainBatch(
        mask=torch.ones_like(ref) if mask is None else mask,
        advantages=torch.zeros_like(ref),
        weights=torch.ones_like(ref),
        rewards=rows.to(ref.dtype),
        group=rows,
        source=rows,
        version=rows,
        old_logp=old,
        ref_logp=ref,
    )


def softmax_pair() -> tuple[Tensor, Tensor]:
    """Logits of a policy and of a reference over 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def kl(logp: Tensor, batch: TrainBatch, **hp: object) -> Tensor:
    return LOSS_TERMS.bind("kl", hp)(PolicyTokens(logp), batch).values


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_is_zero_at_the_reference_and_pulls_nowhere(estimator: str):
    logp = torch.tensor([[-0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    values = kl(logp, batch_of(logp.detach()), estimator=estimator)
    assert not values.any()
    assert not torch.autograd.grad(values.sum(), logp)[0].any()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(estimator: str):
    d = torch.linspace(-8, 8, 101, dtype=torch.float64)[None]
    values = kl(torch.zeros_like(d), batch_of(d), estimator=estimator)
    assert (values >= 0).all() and values.max() > 1


def test_k1_as_a_loss_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"estimator must be .*got 'k1'.*expectation is 0.*use k2 or k3.*kl_coef"
    ):
        LOSS_TERMS.bind("kl", {"estimator": "k1"})


@pytest.mark.parametrize("estimator", ["k1_plus", "k3", "k3_plus"])
def test_the_value_is_unbiased_for_the_reverse_kl(estimator: str):
    # E over all 7 tokens of the value = sum p ln(p / q), exactly; k2 is biased
    logits, ref_logits = softmax_pair()
    p = logits.softmax(0)
    logp = logits.log_softmax(0)
    ref = ref_logits.log_softmax(0)
    exact = (p * (logp - ref)).sum()
    assert_close((p * kl(logp[None], batch_of(ref[None]), estimator=estimator)[0]).sum(), exact)
    assert abs((p * kl(logp[None], batch_of(ref[None]), estimator="k2")[0]).sum() - exact) > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k1_plus", "k3_plus"])
def test_k2_and_the_plus_forms_have_the_gradient_of_the_reverse_kl(estimator: str):
    # E_p[grad of the term at sampled tokens] against autograd through sum p (ln p - ln q)
    logits, ref_logits = softmax_pair()
    assert_close(
        expected_gradient(logits, ref_logits, estimator),
        gradient_of_divergence(logits, ref_logits, "reverse"),
    )


def test_k3_has_the_gradient_of_the_forward_kl():
    logits, ref_logits = softmax_pair()
    assert_close(
        expected_gradient(logits, ref_logits, "k3"), gradient_of_divergence(logits, ref_logits, "forward")
    )


def expected_gradient(logits: Tensor, ref_logits: Tensor, estimator: str) -> Tensor:
    logits = logits.clone().requires_grad_()
    values = kl(logits.log_softmax(0)[None], batch_of(ref_logits.log_softmax(0)[None]), estimator=estimator)[
        0
    ]
    return torch.autograd.grad((logits.detach().softmax(0) * values).sum(), logits)[0]


def gradient_of_divergence(logits: Tensor, ref_logits: Tensor, which: str) -> Tensor:
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(0)
    ref = ref_logits.log_softmax(0)
    value = (logp.exp() * (logp - ref)).sum() if which == "reverse" else (ref.exp() * (ref - logp)).sum()
    return torch.autograd.grad(value, logits)[0]


def test_ratio_corrected_k3_has_the_gradient_of_the_reverse_kl_from_stale_samples():
    # samples of another policy b: E_b[r k3], r = p / b, is the reverse KL, and r carries a gradient
    logits, ref_logits = softmax_pair()
    behaviour = torch.zeros(7, dtype=torch.float64).log_softmax(0)
    logits = logits.requires_grad_()
    batch = batch_of(ref_logits.log_softmax(0)[None], old=behaviour[None])
    values = kl(logits.log_softmax(0)[None], batch, ratio_corrected=True)[0]
    got = torch.autograd.grad((behaviour.exp() * values).sum(), logits)[0]
    assert_close(got, gradient_of_divergence(logits.detach(), ref_logits, "reverse"))


def test_the_released_clamp_bounds_the_value_and_stops_the_gradient():
    # d = 3: k3 = e^3 - 4 = 16.1, clamped to 10
    logp = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    batch = batch_of(torch.full((1, 1), 3.0, dtype=torch.float64))
    assert_close(kl(logp, batch).item(), math.exp(3) - 4)
    clamped = kl(logp, batch, clamp="verl")
    assert clamped.item() == 10.0
    assert torch.autograd.grad(clamped.sum(), logp)[0].item() == 0


def test_ratio_correction_needs_old_logp_only_when_on():
    assert LOSS_TERMS.bind("kl").needs == {"ref_logp"}
    assert LOSS_TERMS.bind("kl", {"ratio_corrected": True}).needs == {"ref_logp", "old_logp"}


def test_the_entropy_bonus_rewards_entropy():
    entropy = torch.tensor([[0.3, 1.2]], requires_grad=True)
    values = LOSS_TERMS.bind("entropy")(
        PolicyTokens(torch.zeros(1, 2), entropy), batch_of(torch.zeros(1, 2))
    ).values
    assert torch.autograd.grad(values.sum(), entropy)[0].tolist() == [[-1.0, -1.0]]
    assert LOSS_TERMS.bind("entropy").needs == {"entropy_grad"}


@pytest.mark.parametrize(
    ("name", "hp"),
    [("entropy", {}), *(("kl", {"estimator": kind, "ratio_corrected": True}) for kind in ESTIMATORS)],
)
def test_padding_reaches_neither_value_nor_gradient(name: str, hp: dict[str, object]):
    mask = torch.tensor([[True, True, False]])
    bad = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    batch = batch_of(torch.tensor([[-1.5, -1.0, math.nan]]), mask, old=torch.tensor([[-1.0, -1.0, math.nan]]))
    values = LOSS_TERMS.bind(name, hp)(PolicyTokens(bad, bad), batch).values
    slope = torch.autograd.grad(values.sum(), bad)[0]
    assert values[0, 2] == 0 and slope[0, 2] == 0 and slope[mask].all()


@pytest.mark.parametrize(("name", "missing"), [("kl", "ref_logp"), ("entropy", "policy.entropy")])
def test_a_missing_input_is_named(name: str, missing: str):
    batch = batch_of(torch.zeros(1, 1)).replace(ref_logp=None)
    with pytest.raises(ValueError, match=f"the {name} term needs {missing}"):
        LOSS_TERMS.bind(name)(PolicyTokens(torch.zeros(1, 1)), batch)
