"""Credit for the steps of a trajectory: the turns of an agent, or the lines of a single completion."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rltrain.needs import OLD_ENTROPY, STEP_ID, TOKEN_LEVEL
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import TrainBatch

__all__ = ["empg"]


@method("empg", arxiv="2509.09265", needs={OLD_ENTROPY, STEP_ID}, traits={TOKEN_LEVEL})
def empg(
    batch: TrainBatch,
    *,
    k: float = 1.0,
    k_bonus: float = 1.0,
    zeta: float = 0.05,
    center: Literal["steps", "rows", "none"] = "steps",
) -> TrainBatch:
    """EMPG: advantages scaled by how certain the policy was of each step, plus a bonus for the next step's
    clarity, arXiv:2509.09265.

    Formula: ``A g + zeta f_next - mean``; ``g = exp(-k h) / mean exp(-k h)``, ``f = exp(-k_bonus h)``, ``h =
    (H - min H) / (max H - min H)``

    A step's entropy H is the mean over its tokens; its smallest, largest and mean are taken over all steps of
    the batch, all ranks. f_next is that of the row's next step; the last has no bonus. The mean over steps is
    subtracted, without division by a standard deviation. center "rows": the mean over trajectories of their
    means over steps is subtracted, as in some ports; "none": nothing. With k 0 and zeta 0 the result is the
    advantages minus their mean. The paper's zeta for each task is not known: ports of its listing use 0.1,
    tuned agents 0.05. One outlying step compresses h of all others. Tokens that belong to no step get their
    advantage minus the same mean.
    """
    steps = _collect_steps(batch)
    if len(steps.row) == 0:
        return batch
    entropy = _step_means(_require_field(batch, "old_entropy"), steps)
    low = entropy.min()
    high = entropy.max()
    normal = (entropy - low) / (high - low + 1e-8)
    certainty = (-k * normal).exp()
    scale = certainty / (certainty.mean() + 1e-8)
    clarity = (-k_bonus * normal).exp()
    has_next = torch.cat([steps.row[1:] == steps.row[:-1], steps.row.new_zeros(1, dtype=torch.bool)])
    bonus = zeta * torch.where(has_next, clarity.roll(-1), torch.zeros_like(clarity))

    advantages = apply_mask(batch.advantages, batch.mask)
    scaled = advantages.index_put(
        (steps.token_row, steps.token_column), _modulate_tokens(steps, advantages, scale, bonus)
    )

    scaled = scaled - _center_value(_step_means(scaled, steps), steps, center)
    notes = {
        "empg_steps": float(len(steps.row)),
        "empg_step_entropy": float(entropy.mean()),
        "empg_step_entropy_max": float(high),
    }
    return batch.replace(advantages=apply_mask(scaled, batch.mask)).with_metrics(**notes)


class _Steps(NamedTuple):
    """S steps, ordered by row and then by time, and the n tokens that belong to a step."""

    row: Tensor  # (S,) row of each step
    token_row: Tensor  # (n,) row of each token
    token_column: Tensor  # (n,) column of each token
    token_step: Tensor  # (n,) step of each token
    tokens: Tensor  # (S,) number of tokens in each step


def _collect_steps(batch: TrainBatch) -> _Steps:
    step_id = _require_field(batch, "step_id")
    token_row, token_column = torch.nonzero(batch.mask & (step_id >= 0), as_tuple=True)
    ids = step_id[token_row, token_column]
    width = int(ids.max()) + 1 if len(ids) else 1
    keys, token_step, tokens = torch.unique(token_row * width + ids, return_inverse=True, return_counts=True)
    return _Steps(keys // width, token_row, token_column, token_step, tokens)


def _step_means(values: Tensor, steps: _Steps) -> Tensor:
    """(S,) mean over the tokens of each step."""
    total = torch.zeros(len(steps.row), dtype=values.dtype, device=values.device)
    return total.index_add(0, steps.token_step, values[steps.token_row, steps.token_column]) / steps.tokens


def _modulate_tokens(steps: _Steps, advantages: Tensor, scale: Tensor, bonus: Tensor) -> Tensor:
    """(n,) ``A g + zeta f_next`` of the tokens that belong to a step."""
    return advantages[steps.token_row, steps.token_column] * scale[steps.token_step] + bonus[steps.token_step]


def _center_value(
    modulated: Tensor, steps: _Steps, center: Literal["steps", "rows", "none"]
) -> Tensor | float:
    if center == "none":
        return 0.0
    if center == "steps":
        return modulated.mean()
    _, inverse, count = torch.unique(steps.row, return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=modulated.dtype, device=modulated.device)
    return (total.index_add(0, inverse, modulated) / count).mean()


def _require_field(batch: TrainBatch, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        reason = "the learner did not compute it"
        if name == "step_id":
            reason = "no completion has turns and none was split into lines"
        raise ValueError(f"control empg needs {name}, which the batch lacks: {reason}")
    return value.detach()
