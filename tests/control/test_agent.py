"""EMPG: steps, their certainty, and what their tokens get."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control.agent import empg
from rltrain.types.policy import TrainBatch

NAN = math.nan


def batch_of(step_id: Tensor, entropy: Tensor, advantages: Tensor) -> TrainBatch:
    rows = torch.zeros(len(step_id), dtype=torch.int64)
    mask = step_id >= 0
    return TrainBatch(
        mask=mask,
        advantages=advantages.masked_fill(~mask, NAN),
        weights=torch.ones_like(entropy),
        rewards=rows.double(),
        group=rows,
        source=rows,
        version=rows,
        old_entropy=entropy.masked_fill(~mask, NAN),
        step_id=step_id,
    )


def random_batch(seed: int = 0) -> TrainBatch:
    """6 rows of 10 tokens with up to 4 turns of 1 to 3 tokens, other speakers' tokens between them;
    row 2 is empty.
    """
    generator = np.random.default_rng(seed)
    step_id = -torch.ones(6, 10, dtype=torch.int64)
    for row in (0, 1, 3, 4, 5):
        start = 0
        for step in range(int(generator.integers(1, 5))):
            length = int(generator.integers(1, 3))
            step_id[row, start : start + length] = step
            start += length + int(generator.integers(0, 2))
    entropy = torch.tensor(generator.random((6, 10)))
    advantages = torch.tensor(generator.normal(size=(6, 1))).expand(6, 10)
    return batch_of(step_id, entropy, advantages)


def by_loops(batch: TrainBatch, k: float, k_bonus: float, zeta: float) -> np.ndarray:
    assert batch.step_id is not None and batch.old_entropy is not None
    ids = batch.step_id.numpy()
    entropy = batch.old_entropy.numpy()
    out = np.zeros(batch.mask.shape)
    steps = [(row, step) for row in range(len(ids)) for step in range(ids[row].max() + 1)]
    mean = np.array([entropy[row][ids[row] == step].mean() for row, step in steps])
    h = (mean - mean.min()) / (mean.max() - mean.min() + 1e-8)
    g = np.exp(-k * h) / (np.exp(-k * h).mean() + 1e-8)
    f = np.exp(-k_bonus * h)
    values = []
    for number, (row, step) in enumerate(steps):
        advantage = batch.advantages[row][ids[row] == step][0].item()
        last = number + 1 == len(steps) or steps[number + 1][0] != row
        values.append(advantage * g[number] + (0.0 if last else zeta * f[number + 1]))
        out[row][ids[row] == step] = values[-1]
    return np.where(batch.mask.numpy(), out - np.mean(values), 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_its_equations(seed: int):
    batch = random_batch(seed)
    got = empg(batch, k=0.7, k_bonus=1.5, zeta=0.1)
    np.testing.assert_allclose(got.advantages.numpy(), by_loops(batch, 0.7, 1.5, 0.1), atol=1e-12)


def test_without_scale_and_bonus_the_advantages_lose_only_their_mean_over_steps():
    # 2 steps with A = 1 (3 tokens), 1 with A = -2: mean over steps 0, over tokens it would be 0.25
    batch = batch_of(
        torch.tensor([[0, 0, 1], [0, -1, -1]]),
        torch.rand(2, 3).double(),
        torch.tensor([[1.0], [-2.0]]).double().expand(2, 3),
    )
    assert_close(empg(batch, k=0.0, zeta=0.0).advantages, torch.where(batch.mask, batch.advantages, 0.0))


def test_scales_average_1_over_steps():
    batch = random_batch(1)
    unit_batch = batch.replace(advantages=torch.ones_like(batch.advantages))
    result = empg(unit_batch, zeta=0.0, center="none").advantages
    assert batch.step_id is not None
    firsts = [
        result[row][batch.step_id[row] == step][0]
        for row in range(6)
        for step in range(int(batch.step_id[row].max()) + 1)
    ]
    assert_close(torch.stack(firsts).mean(), torch.tensor(1.0).double(), atol=1e-7, rtol=0)


def test_among_good_steps_the_surer_learn_more():
    entropy = torch.tensor([[0.9, 0.1, 0.5]]).double()
    batch = batch_of(torch.tensor([[0, 1, 2]]), entropy, torch.ones(1, 3).double())
    got = empg(batch, zeta=0.0).advantages[0]
    assert got[1] > got[2] > got[0]


def test_the_bonus_looks_at_the_next_step_and_the_last_has_none():
    # A = 0: only the bonus is left, exp(-h) of the next step; entropies 0, 1, 0.5 are their own h
    batch = batch_of(
        torch.tensor([[0, 1, 1, 2]]),
        torch.tensor([[0.0, 1.0, 1.0, 0.5]]).double(),
        torch.zeros(1, 4).double(),
    )
    got = empg(batch, zeta=1.0, center="none").advantages[0]
    want = torch.tensor([math.exp(-1), math.exp(-0.5), math.exp(-0.5), 0.0]).double()
    assert_close(got, want, atol=1e-7, rtol=0)


def test_the_order_of_rows_and_wider_padding_change_nothing():
    batch = random_batch(2)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert_close(empg(batch.rows(order)).advantages, empg(batch).advantages[order])


def test_steps_of_equal_entropy_are_left_alone_but_for_the_bonus_and_the_mean():
    batch = batch_of(torch.tensor([[0, 1]]), torch.full((1, 2), 0.3).double(), torch.ones(1, 2).double())
    got = empg(batch, zeta=0.1).advantages[0]
    assert_close(got, torch.tensor([0.05, -0.05]).double(), atol=1e-7, rtol=0)  # 1.1 and 1 less 1.05


def test_a_step_without_a_token_passes_through():
    batch = batch_of(
        -torch.ones(2, 3, dtype=torch.int64), torch.rand(2, 3).double(), torch.ones(2, 3).double()
    )
    assert empg(batch) is batch


def test_missing_steps_are_named_with_what_would_bring_them():
    with pytest.raises(
        ValueError, match=r"empg needs step_id, which the batch lacks: no completion has turns"
    ):
        empg(random_batch().replace(step_id=None))


def test_the_gradient_of_a_softmax_grows_with_uncertainty():
    # the coupling EMPG corrects: E |grad_z ln pi(a)|^2 = 1 - sum p^2; p = (.7, .2, .1): 0.46
    p = np.array([0.7, 0.2, 0.1])
    assert sum(p[a] * ((np.eye(3)[a] - p) ** 2).sum() for a in range(3)) == pytest.approx(0.46)
