"""Clip-Cov and KL-Cov: the covariance compared with numpy; the choice depends on the tokens alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from rltrain.control import TOKEN_CONTROLS
from rltrain.control.covariance import token_covariance
from rltrain.types.policy import TrainBatch

ROWS = 12
WIDTH = 30


def make_batch(seed: int = 0, rows: int = ROWS, width: int = WIDTH, drift: float = 0.3) -> TrainBatch:
    """A ragged batch with 4 completions per group and NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    now, noise = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    number = torch.arange(rows)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, width)
    outside = torch.tensor(math.nan, dtype=torch.float64)
    return TrainBatch(
        mask=mask,
        advantages=torch.where(mask, advantages, outside),
        weights=torch.ones(rows, width, dtype=torch.float64),
        rewards=advantages[:, 0],
        group=number // 4,
        source=number * 0,
        version=number * 0 + 7,
        sample=number % 4,
        old_logp=torch.where(mask, now + drift * noise, outside),
        logp_now=torch.where(mask, now, outside),
    )


def apply_clip_cov(batch: TrainBatch, **hp: float) -> TrainBatch:
    return TOKEN_CONTROLS.bind("clip_cov", hp)(batch)


def kl_cov_marks(batch: TrainBatch, **hp: float) -> Tensor:
    return TOKEN_CONTROLS.bind("kl_cov", hp)(batch).extra["kl_cov"].bool()


def dropped_tokens(batch: TrainBatch, **hp: float) -> Tensor:
    return batch.mask & (apply_clip_cov(batch, **hp).weights == 0)


def covariances(batch: TrainBatch) -> np.ndarray:
    """The definition, over the valid tokens, in the order of the mask."""
    lp = batch.logp_now[batch.mask].numpy()
    a = batch.advantages[batch.mask].numpy()
    return (lp - lp.mean()) * (a - a.mean())


def test_the_mean_of_the_token_covariances_is_the_empirical_covariance():
    batch = make_batch()
    covariance = token_covariance(batch.logp_now, batch.advantages, batch.mask)
    lp = batch.logp_now[batch.mask].numpy()
    a = batch.advantages[batch.mask].numpy()
    assert not covariance[~batch.mask].any()
    np.testing.assert_allclose(covariance[batch.mask].numpy(), covariances(batch), atol=1e-13)
    np.testing.assert_allclose(covariance[batch.mask].mean(), np.cov(lp, a, ddof=0)[0, 1], atol=1e-13)


@pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.1, 0.5, 1.0])
def test_kl_cov_marks_the_tokens_that_sorting_puts_first(ratio: float):
    batch = make_batch()
    n = int(batch.mask.sum())
    want = np.zeros(n, dtype=bool)
    want[np.argsort(-covariances(batch))[: max(1, int(ratio * n))]] = True
    assert (kl_cov_marks(batch, ratio=ratio)[batch.mask].numpy() == want).all()
    assert not kl_cov_marks(batch, ratio=ratio)[~batch.mask].any()


def test_counts_are_those_of_the_paper_at_its_scale():
    # N = 1e5: 2e-4 is 20 tokens (Clip-Cov, KL-Cov 32B), 2e-3 is 200 (KL-Cov 7B)
    batch = make_batch(rows=100, width=1000).replace(mask=torch.ones(100, 1000))
    batch = batch.replace(
        logp_now=torch.randn(100, 1000), old_logp=torch.zeros(100, 1000), advantages=torch.randn(100, 1000)
    )
    assert int(kl_cov_marks(batch).sum()) == 200 and int(kl_cov_marks(batch, ratio=2e-4).sum()) == 20
    assert int(dropped_tokens(batch, low=-100.0, high=100.0, eps_low=100.0, eps_high=1e9).sum()) == 20


def test_clip_cov_drops_only_eligible_tokens_and_all_of_them_where_they_are_few():
    batch = make_batch(drift=0.6)
    r = (batch.logp_now - batch.old_logp)[batch.mask].exp().numpy()
    a = batch.advantages[batch.mask].numpy()
    c = covariances(batch)
    ppo = np.where(a > 0, r > 1.28, r < 0.8)
    eligible = (c > 0.3) & (c < 1.5) & ~ppo
    hp = {"low": 0.3, "high": 1.5, "eps_low": 0.2, "eps_high": 0.28}
    assert 5 < eligible.sum() < ((c > 0.3) & (c < 1.5)).sum(), "the case has tokens that PPO clips"
    assert (dropped_tokens(batch, ratio=1.0, **hp)[batch.mask].numpy() == eligible).all()
    some = dropped_tokens(batch, ratio=0.02, **hp)[batch.mask].numpy()
    assert some.sum() == int(0.02 * batch.mask.sum()) and (some <= eligible).all()
    assert apply_clip_cov(batch, **hp).notes["clip_cov_eligible"] == pytest.approx(eligible.sum() / len(c))


def test_the_bounds_of_the_covariance_are_open():
    # logp -1, -3 and A 1, -1 (means -2 and 0): c = 1 and 1
    batch = make_batch(rows=2, width=1).replace(mask=torch.ones(2, 1), weights=torch.ones(2, 1))
    lp = torch.tensor([[-1.0], [-3.0]])
    a = torch.tensor([[1.0], [-1.0]])
    batch = batch.replace(logp_now=lp, old_logp=lp, advantages=a)
    assert int(dropped_tokens(batch, ratio=1.0, low=0.99, high=1.01).sum()) == 2
    assert (
        not dropped_tokens(batch, ratio=1.0, low=1.0, high=5.0).any()
        and not dropped_tokens(batch, ratio=1.0, low=-5.0, high=1.0).any()
    )


def test_dropped_tokens_keep_the_mask_and_other_weights():
    batch = make_batch().replace(weights=torch.full((ROWS, WIDTH), 3.0))
    after = apply_clip_cov(batch, low=-9.0, high=9.0, ratio=0.3)
    is_dropped = dropped_tokens(batch, low=-9.0, high=9.0, ratio=0.3)
    assert torch.equal(after.mask, batch.mask) and is_dropped.any()
    assert (after.weights[~is_dropped] == 3).all() and torch.equal(
        after.advantages.nan_to_num(), batch.advantages.nan_to_num()
    )


def test_no_eligible_token_changes_nothing():
    batch = make_batch()
    assert torch.equal(apply_clip_cov(batch, low=100.0, high=200.0).weights, batch.weights)
    assert not kl_cov_marks(batch, ratio=0.0).any()


@pytest.mark.parametrize("shift", [100.0, -0.7])
def test_the_choice_ignores_a_constant_added_to_log_probs_or_advantages(shift: float):
    batch = make_batch()
    lifted = batch.replace(logp_now=batch.logp_now + shift, old_logp=batch.old_logp + shift)
    hp = {"low": 0.1, "high": 5.0, "ratio": 0.05}
    assert torch.equal(dropped_tokens(lifted, **hp), dropped_tokens(batch, **hp))
    assert torch.equal(kl_cov_marks(lifted, ratio=0.1), kl_cov_marks(batch, ratio=0.1))
    assert torch.equal(
        kl_cov_marks(batch.replace(advantages=batch.advantages + shift), ratio=0.1),
        kl_cov_marks(batch, ratio=0.1),
    )


def test_the_choice_follows_the_rows_wherever_they_stand_and_however_wide_the_batch_is():
    batch = make_batch(3)
    hp = {"low": 0.05, "high": 9.0, "ratio": 0.04}
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    moved = batch.rows(order)
    assert torch.equal(dropped_tokens(moved, **hp), dropped_tokens(batch, **hp)[order])
    assert torch.equal(kl_cov_marks(moved, ratio=0.04), kl_cov_marks(batch, ratio=0.04)[order])
    longest = int(batch.mask.any(0).nonzero().max()) + 1
    assert torch.equal(
        dropped_tokens(batch.rows(range(ROWS), longest), **hp), dropped_tokens(batch, **hp)[:, :longest]
    )


def test_covariances_are_the_same_bits_in_every_order_of_the_rows():
    # sums in another order differ in the last bit, which is enough to turn a near tie
    batch = make_batch(6, rows=40)
    want = token_covariance(batch.logp_now, batch.advantages, batch.mask)
    for seed in range(20):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        moved = batch.rows(order)
        assert torch.equal(token_covariance(moved.logp_now, moved.advantages, moved.mask), want[order])


def test_equal_covariances_are_drawn_by_lot_and_the_lot_follows_the_row():
    # all log-probs equal: every c is 0, so all 8 x 4 tokens tie and 8 are drawn
    batch = make_batch(rows=8, width=4).replace(
        mask=torch.ones(8, 4), weights=torch.ones(8, 4), advantages=torch.ones(8, 4)
    )
    batch = batch.replace(logp_now=torch.zeros(8, 4), old_logp=torch.zeros(8, 4))
    order = torch.tensor([7, 2, 5, 0, 3, 6, 1, 4])
    once = kl_cov_marks(batch, ratio=0.25)
    assert int(once.sum()) == 8 and int(once.any(1).sum()) > 2, "not simply the first rows"
    assert torch.equal(kl_cov_marks(batch.rows(order), ratio=0.25), once[order])
    assert torch.equal(kl_cov_marks(batch, ratio=0.25), once)


def test_the_draw_is_uniform_and_moves_with_seed_version_group_and_sample():
    # 40 of 320 equally eligible tokens, 300 seeds: each is drawn 37.5 times on average, standard deviation
    # 5.7
    batch = make_batch(rows=16, width=20).replace(
        mask=torch.ones(16, 20), weights=torch.ones(16, 20), advantages=torch.ones(16, 20)
    )
    batch = batch.replace(logp_now=torch.zeros(16, 20), old_logp=torch.zeros(16, 20))
    hp = {"low": -1.0, "high": 1.0, "ratio": 0.125}
    counts = sum(dropped_tokens(batch, seed=seed, **hp).long() for seed in range(300))
    assert int(counts.sum()) == 300 * 40 and int(counts.min()) > 15 and int(counts.max()) < 62
    spread = Counter(int(dropped_tokens(batch, seed=seed, **hp)[0].sum()) for seed in range(300))
    assert len(spread) > 3, "rows are not drawn as a whole"
    for change in ({"version": batch.version + 1}, {"group": batch.group + 4}, {"sample": batch.sample + 1}):
        assert not torch.equal(dropped_tokens(batch.replace(**change), **hp), dropped_tokens(batch, **hp))


def test_rows_without_a_sample_id_are_counted_within_their_group():
    batch = make_batch(5)
    assert torch.equal(
        dropped_tokens(batch.replace(sample=None), low=0.0, high=9.0, ratio=0.1),
        dropped_tokens(batch, low=0.0, high=9.0, ratio=0.1),
    )


def test_the_statistics_are_of_all_rows_and_not_of_their_parts():
    # two halves chosen separately would mark max(1, ...) in each; the whole batch has both marks in the first
    batch = make_batch(2, rows=8, width=10)
    big = batch.replace(advantages=torch.where(torch.arange(8)[:, None] < 4, 10.0, 0.1) * batch.advantages)
    n = int(big.mask.sum())
    whole_marks = kl_cov_marks(big, ratio=2.5 / n)
    parts = torch.cat(
        [kl_cov_marks(big.rows(range(4)), ratio=2.5 / n), kl_cov_marks(big.rows(range(4, 8)), ratio=2.5 / n)]
    )
    assert int(whole_marks.sum()) == 2 and int(whole_marks[:4].sum()) == 2 and int(parts[4:].sum()) == 1


def test_a_batch_without_tokens_passes_through():
    empty = make_batch().replace(mask=torch.zeros(ROWS, WIDTH))
    assert torch.equal(apply_clip_cov(empty).weights, empty.weights) and not kl_cov_marks(empty).any()


def test_float32_batches_choose_as_float64_ones():
    batch = make_batch(4)
    single = batch.replace(
        **{name: getattr(batch, name).float() for name in ("advantages", "weights", "old_logp", "logp_now")}
    )
    assert torch.equal(kl_cov_marks(single, ratio=0.1), kl_cov_marks(batch, ratio=0.1))
    assert apply_clip_cov(single, low=0.1).weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "missing"), [("clip_cov", "old_logp"), ("clip_cov", "logp_now"), ("kl_cov", "logp_now")]
)
def test_a_missing_input_is_named(name: str, missing: str):
    with pytest.raises(ValueError, match=f"control {name} needs {missing}"):
        TOKEN_CONTROLS.bind(name)(make_batch().replace(**{missing: None}))
