"""Invariants of every advantage: the numbers depend on the tokens, not on the width of the batch, its padding
or the order of its rows.

The tests run over all registered advantages, with every choice of every ``Literal`` hyperparameter; a new
advantage is included automatically.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from rltrain.advantage import ADVANTAGES
from rltrain.advantage.stage import compute_advantages
from rltrain.registry import BoundMethod
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import SOURCE_POLICY
from support.fake_gpu import compute_elsewhere
from support.method_cases import SOURCE_CODES, named, promised, variants

ROWS = 12
WIDTH = 9
ENOUGH: dict[str, dict[str, Any]] = {
    "reinforce_pp": {"kl_coef": 0.1},
    "ares": {"targets": [1.0, 2.0, 3.0], "window": 2},
}
VARIANTS = variants(ADVANTAGES, ENOUGH)
EVERY = pytest.mark.parametrize("advantage", VARIANTS, ids=named)
# By its definition aapo's default pairs the rows of two sources in their order.
IN_ORDER = [method for method in VARIANTS if method.name == "aapo" and "reference" not in method.hp]


def batch_for(advantage: BoundMethod) -> TrainBatch:
    """Three groups of four, half of each from the source that the advantage needs; one token inside a row and
    one whole row are masked out.
    """
    generator = torch.Generator().manual_seed(11)
    row = torch.arange(ROWS)
    mask = torch.arange(WIDTH) < torch.randint(2, WIDTH + 1, (ROWS, 1), generator=generator)
    mask[0, 1] = False
    mask[7] = False

    def draw(scale: float, start: float = 0.0) -> Tensor:
        values = start + scale * torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        return values.masked_fill(~mask, math.nan)

    old = draw(-3.0)
    sources = [SOURCE_CODES[name] for name in promised(advantage.spec, "extra_samples")]
    rewards = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return TrainBatch(
        mask=mask,
        advantages=draw(0.0),
        weights=draw(0.2, 0.9),
        rewards=rewards,
        group=row // 4,
        source=torch.where(row % 4 > 1, sources[0] if sources else SOURCE_POLICY, SOURCE_POLICY),
        version=row * 0,
        sample=row % 4,
        correct=(rewards > 0.5).double(),
        answer=(row * 7) % 3 - 1,
        step_id=(torch.arange(WIDTH) // 3).expand(ROWS, WIDTH).masked_fill(~mask, -1),
        old_logp=old,
        rollout_logp=old + draw(0.4, -0.2),
        ref_logp=old + draw(0.6, -0.3),
        old_entropy=draw(2.0),
        process_reward=draw(0.4, -0.2),
        parts={"right": rewards, "short": torch.where(rewards.isnan(), torch.nan, (row * 5) % 7 / 7)},
    )


def masked_advantages(batch: TrainBatch, advantage: BoundMethod) -> Tensor:
    """(B, WIDTH) advantages, 0 outside the mask."""
    return torch.where(batch.mask, compute_advantages(batch, advantage).advantages, 0.0)[:, :WIDTH]


@EVERY
def test_it_says_something_and_is_finite_where_a_token_counts(advantage: BoundMethod) -> None:
    advantages = masked_advantages(batch_for(advantage), advantage)
    assert advantages.isfinite().all() and (advantages.any() or "no_signal" in advantage.spec.traits)


@EVERY
def test_further_columns_of_padding_change_nothing(advantage: BoundMethod) -> None:
    batch = batch_for(advantage)
    fill: dict[str, float] = {"mask": 0, "step_id": -1, "version": 0}
    tokens = {
        name: value for name, value in vars(batch).items() if isinstance(value, Tensor) and value.dim() == 2
    }
    wider = batch.replace(
        **{name: pad(value, (0, 4), value=fill.get(name, math.nan)) for name, value in tokens.items()}
    )
    assert wider.mask.shape == (ROWS, WIDTH + 4)
    want = masked_advantages(batch, advantage)
    assert_close(masked_advantages(wider, advantage), want, rtol=1e-9, atol=1e-12)


@EVERY
def test_what_stands_outside_of_the_mask_is_not_read(advantage: BoundMethod) -> None:
    batch = batch_for(advantage)
    tokens = {
        name: value
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    filled = batch.replace(**{name: value.nan_to_num(7.0) for name, value in tokens.items()})
    want = masked_advantages(batch, advantage)
    assert_close(masked_advantages(filled, advantage), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("advantage", [method for method in VARIANTS if method not in IN_ORDER], ids=named)
def test_the_rows_may_stand_in_any_order(advantage: BoundMethod) -> None:
    batch = batch_for(advantage)
    want = masked_advantages(batch, advantage)
    for seed in range(3):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
        got = masked_advantages(batch.rows(order), advantage)
        assert_close(got, want[order], rtol=1e-9, atol=1e-12)


@EVERY
def test_it_runs_on_the_device_of_its_batch(advantage: BoundMethod) -> None:
    batch = batch_for(advantage)
    result = compute_elsewhere(lambda moved: compute_advantages(moved, advantage), batch)
    expected = compute_advantages(batch, advantage).advantages
    assert_close(result.advantages, expected, rtol=0, atol=0, equal_nan=True)
