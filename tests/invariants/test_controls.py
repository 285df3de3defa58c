"""Invariants of every control: its result depends on the tokens, not on the order of rows or the width of the
batch.

The tests run over all registered controls, with every choice of every ``Literal`` hyperparameter. A new
control is included automatically: the batch has every field filled, and ``extra`` holds the control's other
needs.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from rltrain.control import TOKEN_CONTROLS
from rltrain.control.entropy import ABOVE_TARGET
from rltrain.control.stage import apply_control
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.registry import BoundMethod
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_TEMPERED
from support.fake_gpu import compute_elsewhere
from support.method_cases import named, variants

ROWS = 12
WIDTH = 9
FIELDS = {field.name for field in dataclasses.fields(TrainBatch)}
NOTES = {ABOVE_TARGET: 0.0}  # notes that the rest of a run adds to the step
# Hyperparameters with which a control has something to do on a batch this small.
ENOUGH = {
    "divergence_rejection": {"high": 0.011},
    "clip_cov": {"ratio": 0.1, "low": 0.0},
    "kl_cov": {"ratio": 0.1},
    "geometric_rejection": {"low": 0.9, "high": 1.1},
    "off_policy_mask": {"delta": 0.0},
}


EVERY = pytest.mark.parametrize("control", variants(TOKEN_CONTROLS, ENOUGH), ids=named)


def batch_for(control: BoundMethod) -> TrainBatch:
    """Three groups of four, the last two of each sampled at another temperature; two tokens inside rows and
    one whole row are masked out.
    """
    generator = torch.Generator().manual_seed(11)
    row = torch.arange(ROWS)
    mask = torch.arange(WIDTH) < torch.randint(2, WIDTH + 1, (ROWS, 1), generator=generator)
    mask[0, 1] = mask[5, 0] = False
    mask[7] = False

    def draw(scale: float = 1.0, start: float = 0.0) -> Tensor:
        values = start + scale * torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        return values.masked_fill(~mask, math.nan)

    old = draw(-3.0)
    advantages = (
        torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
        .expand(ROWS, WIDTH)
        .masked_fill(~mask, math.nan)
    )
    tokens = {"old_logp": old, "logp_now": old + draw(0.6, -0.3), "rollout_logp": old + draw(0.4, -0.2)}
    tokens |= {name: draw(-3.0) for name in ("ref_logp", "teacher_logp")}
    tokens |= {name: draw(2.0) for name in ("old_entropy", "entropy_now")}
    return TrainBatch(
        mask=mask,
        advantages=advantages,
        weights=draw(0.2, 0.9),
        rewards=(row % 3 == 0).double(),
        group=row // 4,
        source=torch.where(row % 4 > 1, SOURCE_TEMPERED, SOURCE_POLICY),
        version=row * 0 + 3,
        sample=row % 4,
        correct=(row % 3 == 0).double(),
        answer=(row * 7) % 3 - 1,
        step_id=(torch.arange(WIDTH) // 3).expand(ROWS, WIDTH).masked_fill(~mask, -1),
        extra={name: draw() for name in control.needs - FIELDS},
        notes=NOTES,
        **tokens,
    )


def differences(got: TrainBatch, want: TrainBatch) -> list[str]:
    """Names of tensors that differ or are not finite inside the mask, and of differing masks and notes."""
    if not torch.equal(got.mask, want.mask) or got.extra.keys() != want.extra.keys():
        return ["mask, or the names of extra"]
    pairs = {
        name: (getattr(got, name), getattr(want, name)) for name in ("weights", "advantages", "old_logp")
    }
    pairs |= {name: (got.extra[name], want.extra[name]) for name in want.extra}
    names = []
    for name, (got_values, want_values) in pairs.items():
        got_tokens = got_values[want.mask].double()
        want_tokens = want_values[want.mask].double()
        is_equal = torch.allclose(got_tokens, want_tokens, rtol=1e-7, atol=1e-7)
        if not (is_equal and bool(want_tokens.isfinite().all())):
            names.append(name)
    return names if dict(got.notes) == pytest.approx(dict(want.notes)) else [*names, "notes"]


@EVERY
def test_the_rows_may_stand_in_any_order(control: BoundMethod):
    batch = batch_for(control)
    want = apply_control(batch, control)
    for seed in range(3):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
        assert not differences(apply_control(batch.rows(order), control), want.rows(order))


@EVERY
def test_what_stands_outside_of_the_mask_is_not_read(control: BoundMethod):
    batch = batch_for(control)
    floating = {
        name: value
        for name in FIELDS
        if isinstance(value := getattr(batch, name), Tensor)
        and value.dim() == 2
        and value.is_floating_point()
    }
    filled = {name: value.nan_to_num(7.0) for name, value in floating.items()}
    extra = {name: value.nan_to_num(7.0) for name, value in batch.extra.items()}
    assert not differences(
        apply_control(batch.replace(**filled, extra=extra), control), apply_control(batch, control)
    )


@EVERY
def test_further_columns_of_padding_change_nothing(control: BoundMethod):
    batch = batch_for(control)
    fill: dict[str, float] = {
        "mask": 0,
        "step_id": -1,
        "version": 3,
    }  # the row's last version again, as rollouts have it
    tokens = {
        name: value
        for name in FIELDS
        if isinstance(value := getattr(batch, name), Tensor) and value.dim() == 2
    }
    wider = {name: pad(value, (0, 4), value=fill.get(name, math.nan)) for name, value in tokens.items()}
    extra = {name: pad(value, (0, 4), value=math.nan) for name, value in batch.extra.items()}
    after = apply_control(batch.replace(**wider, extra=extra), control)
    assert not after.mask[:, WIDTH:].any()
    assert not differences(after.rows(range(ROWS), WIDTH), apply_control(batch, control))


@EVERY
def test_nothing_a_control_returns_carries_a_gradient(control: BoundMethod):
    batch = batch_for(control)
    leaves = {
        name: getattr(batch, name).clone().requires_grad_()
        for name in ("old_logp", "logp_now", "old_entropy", "entropy_now")
    }
    after = control(batch.replace(**leaves))
    changed = [
        getattr(after, name)
        for name in ("weights", "advantages", "old_logp")
        if getattr(after, name) is not leaves.get(name)
    ]
    assert not any(value.requires_grad for value in (*changed, *after.extra.values()))
    assert all(isinstance(value, float | int) for value in after.notes.values())


@EVERY
def test_the_same_batch_gives_the_same_bits(control: BoundMethod):
    batch = batch_for(control)
    first = apply_control(batch, control)
    second = apply_control(batch, control)
    for name in ("mask", "weights", "advantages", "old_logp"):
        assert torch.equal(getattr(first, name).nan_to_num(9.0), getattr(second, name).nan_to_num(9.0))
    assert first.notes == second.notes


@EVERY
def test_a_step_without_a_token_passes_through(control: BoundMethod):
    batch = batch_for(control)
    after = apply_control(batch.replace(mask=torch.zeros(ROWS, WIDTH)), control)
    assert not after.mask.any() and all(math.isfinite(value) for value in after.notes.values())


@EVERY
def test_the_loss_behind_a_control_may_be_split_into_micro_batches(control: BoundMethod):
    made_for = [trait.partition(":")[2] for trait in control.spec.traits if trait.startswith("policy_loss:")]
    objective = Objective(POLICY_LOSSES.bind((made_for or ["clip"])[0]), (), AGGREGATES.bind("token_mean"))
    batch = apply_control(batch_for(control), control)
    totals = StepTotals(*batch.totals_of_mask, max_tokens=WIDTH)

    def outcome(parts: list[list[int]]) -> tuple[Tensor, Tensor]:
        logp = batch_for(control).logp_now.clone().requires_grad_()
        loss = sum(
            (objective(PolicyTokens(logp[rows]), batch.rows(rows), totals).loss for rows in parts),
            torch.zeros(()).double(),
        )
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    whole_outcome = outcome([list(range(ROWS))])
    assert whole_outcome[1].isfinite().all() and whole_outcome[1].any()
    for parts in ([[row] for row in range(ROWS)], [[3, 9, 0], [1, 2, 4, 5, 6], [11, 8, 7, 10]]):
        assert_close(outcome(parts), whole_outcome)


@EVERY
def test_it_runs_on_the_device_of_its_batch(control: BoundMethod) -> None:
    batch = batch_for(control)
    expected = apply_control(batch, control)
    result = compute_elsewhere(lambda moved: apply_control(moved, control), batch)
    for name in ("weights", "advantages", "mask"):
        assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    assert_close(dict(result.extra), dict(expected.extra), rtol=0, atol=0, equal_nan=True)
    assert result.notes == expected.notes
