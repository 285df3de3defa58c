"""One step, many layouts: micro-batches, row order and padding change neither loss, gradient nor metric.

Runs over everything registered: policy losses x aggregates x terms. A new name is picked up by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch

ROWS = 8
WIDTH = 7
LENGTHS = torch.tensor([7, 3, 5, 0, 1, 7, 4, 6])  # row 3 is fully masked out
TERMS = [(), *((name,) for name in LOSS_TERMS.names()), tuple(LOSS_TERMS.names())]
Outcome = tuple[Tensor, Tensor, Mapping[str, Tensor]]


def whole_step() -> tuple[Tensor, TrainBatch]:
    """(2, 8, 7) leaves: log-prob and entropy of every token; and the batch, with NaN in all padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(WIDTH) < LENGTHS[:, None]
    mask[0, 2] = False  # a token the policy did not write, inside a completion

    def draw(scale: float, start: float = 0.0) -> Tensor:
        values = start + scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        return values.masked_fill(~mask, math.nan)

    old = draw(0.5, -2.0)
    leaves = torch.stack([old + draw(0.3), draw(0.2, 1.0)]).requires_grad_()
    rows = torch.arange(ROWS)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.3, -2.0, 1.5], dtype=torch.float64)[
        :, None
    ].expand(ROWS, WIDTH)
    more = {name: draw(0.5, -2.0) for name in ("rollout_logp", "logp_now", "ref_logp", "teacher_logp")}
    from_controls = {
        "kl_cov": (draw(1.0) > 0).double(),
        "h_hat": draw(0.5).clamp(-1, 1),
        "advantage_global": draw(1.0),
    }
    from_controls |= {name: (draw(1.0) > 0).double() for name in ("kdrl", "teacher_text")} | {
        "ref_log_mass:0.5": draw(0.1, 1.0)
    }
    from_controls["advantage_global"][2] = 0.0  # so that row 2 is idle
    batch = TrainBatch(
        mask=mask,
        advantages=advantages.masked_fill(~mask, math.nan),
        weights=draw(0.1, 1.0),
        rewards=advantages[:, 0],
        group=rows // 4,
        source=rows * 0,
        version=rows * 0,
        old_logp=old,
        old_entropy=draw(0.2, 1.0),
        extra=from_controls,
        **more,
    )
    return leaves, batch


def run(
    objective: Objective,
    leaves: Tensor,
    batch: TrainBatch,
    micro_batches: list[list[int]],
    width: int | None = None,
) -> Outcome:
    """Accumulate shares over micro-batches, each cut to ``width`` columns (None: to its own longest row)."""
    tokens, sequences = batch.totals_of_mask
    totals = StepTotals(tokens, sequences, max_tokens=20)
    loss = torch.zeros((), dtype=torch.float64)
    metrics = {}
    for rows in micro_batches:
        cut = width or max(1, int(LENGTHS[rows].max()))
        logp, entropy = leaves[:, rows, :cut]
        share = objective(policy_of(objective, logp, entropy), batch.rows(rows, cut), totals)
        loss = loss + share.loss
        metrics = {name: metrics.get(name, 0.0) + value for name, value in share.metrics.items()}
    return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)[0], metrics


def policy_of(objective: Objective, logp: Tensor, entropy: Tensor) -> PolicyTokens:
    """With the further statistics that the objective asks for, as functions of the entropy leaf."""
    asked = [name for name in objective.needs if ":" in name and not name.startswith("ref_")]
    return PolicyTokens(logp, entropy, dict.fromkeys(asked, 0.9 * entropy))


def same(got: Outcome, want: Outcome) -> None:
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert_close(dict(got[2]), dict(want[2]))


@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("aggregate", AGGREGATES.names())
@pytest.mark.parametrize("policy_loss", POLICY_LOSSES.names())
def test_layout_changes_nothing(policy_loss: str, aggregate: str, terms: tuple[str, ...]):
    named = tuple(Term(name, LOSS_TERMS.bind(name), 0.3) for name in terms)
    objective = Objective(POLICY_LOSSES.bind(policy_loss), named, AGGREGATES.bind(aggregate))
    leaves, batch = whole_step()
    want = run(objective, leaves, batch, [list(range(ROWS))])
    assert want[0].isfinite() and want[1].isfinite().all() and want[1].any()
    assert not want[1][:, ~batch.mask].any(), "padding has a gradient"

    order = [5, 2, 7, 0, 3, 6, 1, 4]
    halves = [order[:4], order[4:]]
    singles = [[row] for row in range(ROWS)]
    for layout in ([order], halves, [order[:2], order[2:4], order[4:6], order[6:]], singles):
        same(run(objective, leaves, batch, layout), want)
    same(run(objective, leaves, batch, halves, width=WIDTH), want)

    tokenwise = {
        name: value
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.dim() == 2 and name != "mask"
    }
    fill = {"version": 0}
    padded = {name: pad(value, (0, 5), value=fill.get(name, math.nan)) for name, value in tokenwise.items()}
    padded_extra = {name: pad(value, (0, 5), value=math.nan) for name, value in batch.extra.items()}
    wider = batch.replace(**padded, extra=padded_extra, mask=pad(batch.mask, (0, 5), value=False))
    loss, slope, metrics = run(objective, pad(leaves, (0, 5), value=math.nan), wider, halves, width=WIDTH + 5)
    same((loss, slope[..., :WIDTH], metrics), want)


@pytest.mark.parametrize("aggregate", AGGREGATES.names())
@pytest.mark.parametrize("policy_loss", POLICY_LOSSES.names())
def test_leaving_idle_rows_out_changes_no_gradient(policy_loss: str, aggregate: str):
    objective = Objective(POLICY_LOSSES.bind(policy_loss), (), AGGREGATES.bind(aggregate))
    leaves, batch = whole_step()
    idle = objective.idle_rows(batch)
    traits = POLICY_LOSSES.spec(policy_loss).traits
    expected = (
        [3] if {"acts_on_marks", "reward_free", "acts_everywhere"} & traits else [2, 3]
    )  # A = 0, and no token
    assert set(expected) <= set(idle.nonzero().flatten().tolist()) <= {2, 3}
    tokens, sequences = batch.totals_of_mask
    kept = [row for row in range(ROWS) if not idle[row]]
    logp, entropy = leaves[:, kept]
    share = objective(
        policy_of(objective, logp, entropy), batch.rows(kept), StepTotals(tokens, sequences, max_tokens=20)
    )
    assert_close(
        torch.autograd.grad(share.loss, leaves)[0], run(objective, leaves, batch, [list(range(ROWS))])[1]
    )
