from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control import TOKEN_CONTROLS
from rltrain.types.policy import TrainBatch


def batch_of(
    old: Tensor, rollout: Tensor, mask: Tensor, advantages: Tensor | None = None, now: Tensor | None = None
) -> TrainBatch:
    rows = torch.zeros(mask.shape[0], dtype=torch.int64)
    return TrainBatch(
        mask=mask,
        advantages=torch.ones_like(old) if advantages is None else advantages,
        weights=torch.ones_like(old),
        rewards=rows.to(old.dtype),
        group=rows,
        source=rows,
        version=rows,
        old_logp=old,
        rollout_logp=rollout,
        logp_now=now,
    )


def random_batch(seed: int = 0) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    old, rollout = (-torch.rand(6, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0, 4, 2])[:, None]
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None].expand(6, 5)
    return batch_of(
        old.masked_fill(~mask, math.nan), rollout, mask, sign.contiguous(), old.masked_fill(~mask, math.nan)
    )


def settings(name: str) -> list[dict[str, object]]:
    levels = [{"level": "token"}, {"level": "sequence"}] if name in ("tis", "mis") else [{}]
    return [*levels, *({**level, "normalize": "batch"} for level in levels if name == "tis")]


OURS = [name for name, spec in TOKEN_CONTROLS.specs.items() if spec.module == "rltrain.control.off_policy"]
EVERY = [(name, hp) for name in OURS for hp in settings(name)]


@pytest.mark.parametrize(("name", "hp"), EVERY)
def test_an_engine_that_agrees_with_the_learner_changes_nothing(name: str, hp: dict[str, object]):
    batch = random_batch()
    after = TOKEN_CONTROLS.bind(name, hp)(batch.replace(rollout_logp=batch.old_logp))
    assert_close(after.weights[batch.mask], torch.ones(15, dtype=torch.float64))
    assert torch.equal(after.mask, batch.mask)


@pytest.mark.parametrize("name", ["tis", "mis"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_a_bound_the_weight_is_plain_importance_sampling(name: str, level: str):
    batch = random_batch(1)
    after = TOKEN_CONTROLS.bind(name, {"level": level, {"tis": "cap", "mis": "high"}[name]: 1e9})(batch)
    log_rho = torch.where(batch.mask, batch.old_logp - batch.rollout_logp, 0.0)
    rho = log_rho.exp() if level == "token" else log_rho.sum(1, keepdim=True).exp().expand(6, 5)
    assert_close(after.weights[batch.mask], rho[batch.mask])


@pytest.mark.parametrize(("name", "hp"), EVERY)
def test_weights_carry_no_gradient_and_padding_stays_out(name: str, hp: dict[str, object]):
    batch = random_batch(2)
    after = TOKEN_CONTROLS.bind(name, hp)(batch.replace(old_logp=batch.old_logp.clone().requires_grad_()))
    assert not after.weights.requires_grad
    assert after.weights.isfinite().all()
    assert not after.weights[~batch.mask & (after.weights != 1)].any()


@pytest.mark.parametrize(("name", "hp"), EVERY)
def test_controls_multiply_the_weights_that_are_there(name: str, hp: dict[str, object]):
    batch = random_batch(3)
    once = TOKEN_CONTROLS.bind(name, hp)(batch)
    twice = TOKEN_CONTROLS.bind(name, hp)(batch.replace(weights=3 * batch.weights))
    assert_close(twice.weights[batch.mask], 3 * once.weights[batch.mask])


def test_batch_normalised_weights_average_to_one_over_what_they_weigh():
    batch = random_batch(4)
    token = TOKEN_CONTROLS.bind("tis", {"normalize": "batch"})(batch).weights
    sequence = TOKEN_CONTROLS.bind("tis", {"normalize": "batch", "level": "sequence"})(batch).weights
    rows = [0, 1, 2, 4, 5]  # row 3 has no token
    assert_close(token[batch.mask].mean().item(), 1.0)
    assert_close(sequence[rows, 0].mean().item(), 1.0)
    assert abs(sequence[batch.mask].mean().item() - 1.0) > 1e-3


def test_dropped_tokens_stay_in_the_denominator_unless_asked():
    # rho per token [0.8, 1.25, 1.0; 2.5, 0.8]: one of five leaves [0.5, 2]
    old = torch.tensor([[0.4, 0.5, 0.1], [0.5, 0.2, 1.0]]).log()
    rollout = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.25, 1.0]]).log()
    batch = batch_of(old, rollout, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    hp = {"level": "token", "low": 0.5, "high": 2.0}
    stays, leaves = (
        TOKEN_CONTROLS.bind("mis", {**hp, "denominator": form})(batch) for form in ("all", "kept")
    )
    assert stays.totals_of_mask == (5, 2) and leaves.totals_of_mask == (4, 2)
    assert torch.equal(stays.weights, leaves.weights) and stays.weights[1, 0] == 0


def test_geometric_rejection_bounds_rho_and_not_its_inverse():
    # rho = 1.2 on every token: inside [0.9, 1.3]; its inverse 0.83 is not
    old = torch.full((1, 4), math.log(0.6))
    batch = batch_of(old, old - math.log(1.2), torch.ones(1, 4))
    assert TOKEN_CONTROLS.bind("geometric_rejection", {"low": 0.9, "high": 1.3})(batch).totals_of_mask == (
        4,
        1,
    )
    assert TOKEN_CONTROLS.bind("geometric_rejection", {"low": 0.77, "high": 1.1})(batch).totals_of_mask == (
        0,
        0,
    )


def test_geometric_rejection_does_not_punish_length():
    # rho = 1.0005 per token: the product over 2,000 tokens is 2.7, the geometric mean stays 1.0005
    old = torch.full((1, 2000), -1.0, dtype=torch.float64)
    batch = batch_of(old, old - math.log(1.0005), torch.ones(1, 2000))
    assert TOKEN_CONTROLS.bind("geometric_rejection")(batch).totals_of_mask == (2000, 1)
    assert not TOKEN_CONTROLS.bind("mis", {"level": "sequence", "high": 2.0})(batch).weights.any()


def test_off_policy_mask_never_drops_a_good_sequence():
    rollout = torch.full((2, 3), -1.0)
    now = rollout - 9.0  # 9 nats per token away
    batch = batch_of(rollout, rollout, torch.ones(2, 3), torch.tensor([[0.5] * 3, [-0.5] * 3]), now)
    assert TOKEN_CONTROLS.bind("off_policy_mask")(batch).weights.tolist() == [[1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("name", "hp"), EVERY)
def test_a_missing_input_is_named(name: str, hp: dict[str, object]):
    with pytest.raises(ValueError, match=f"control {name} needs rollout_logp"):
        TOKEN_CONTROLS.bind(name, hp)(random_batch().replace(rollout_logp=None))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_logarithm_of_a_weight_is_clamped_to_20_first(level: str):
    # two tokens, ln rho = 30 each: e^20 and neither e^30 nor e^60
    old = torch.full((1, 2), -1.0, dtype=torch.float64)
    batch = batch_of(old, old - 30.0, torch.ones(1, 2))
    weights = TOKEN_CONTROLS.bind("tis", {"level": level, "cap": 1e30})(batch).weights
    assert_close(weights, torch.full((1, 2), math.exp(20), dtype=torch.float64))


def test_extreme_mismatch_stays_finite():
    old = torch.full((1, 3), -1.0)
    batch = batch_of(old, old - 400.0, torch.ones(1, 3))
    for name, hp in EVERY:
        assert TOKEN_CONTROLS.bind(name, hp)(batch.replace(logp_now=old)).weights.isfinite().all()
