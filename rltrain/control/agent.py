"""Credit for the steps of a trajectory: assistant turns of an agent, or the lines of a single completion."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.tensor_ops import masked
from rltrain.types.policy import TrainBatch

__all__ = ["empg"]


@method("empg", arxiv="2509.09265", needs={"old_entropy", "step_id"}, traits={"token_level"})
def empg(
    batch: TrainBatch,
    *,
    k: float = 1.0,
    k_bonus: float = 1.0,
    zeta: float = 0.05,
    center: Literal["steps", "rows", "none"] = "steps",
) -> TrainBatch:
    """EMPG: advantages scaled by how sure the policy was of each step, plus a bonus for the next step's
    clarity, arXiv:2509.09265.

    A step's entropy H is the mean over its tokens; h = (H - min) / (max - min) over all steps of the batch,
    all ranks. Its tokens get ``A g + zeta f_next`` with g = exp(-k h) / mean exp(-k h) and f = exp(-k_bonus
    h); the last step of a row has no bonus. Then the mean over steps is subtracted (no division by a standard
    deviation). center "rows": a mean over trajectories of their means over steps, as some ports have it;
    "none": nothing. k 0 and zeta 0 leave the advantages less their mean. The paper's own zeta per task is not
    known: its listing is ported with 0.1, tuned agents use 0.05. One outlying step compresses all others' h.
    Tokens that belong to no step keep their advantage, less the same mean.
    """
    steps = _steps(batch)
    if len(steps.row) == 0:
        return batch
    entropy = _mean_of_steps(_required(batch, "old_entropy"), steps)
    low, high = entropy.min(), entropy.max()
    normal = (entropy - low) / (high - low + 1e-8)
    sure = (-k * normal).exp()
    scale = sure / (sure.mean() + 1e-8)
    clarity = (-k_bonus * normal).exp()
    followed = torch.cat([steps.row[1:] == steps.row[:-1], steps.row.new_zeros(1, dtype=torch.bool)])
    bonus = zeta * torch.where(followed, clarity.roll(-1), torch.zeros_like(clarity))

    advantages = masked(batch.advantages, batch.mask)
    scaled = advantages.index_put(
        (steps.of_rows, steps.of_columns), _at_tokens(steps, advantages, scale, bonus)
    )
    scaled = scaled - _center(_mean_of_steps(scaled, steps), steps, center)
    shown = {
        "empg_steps": float(len(steps.row)),
        "empg_step_entropy": float(entropy.mean()),
        "empg_step_entropy_max": float(high),
    }
    return batch.replace(advantages=masked(scaled, batch.mask)).with_metrics(**shown)


class _Steps(NamedTuple):
    """S steps in row order, within a row in time; and the n tokens that belong to one."""

    row: Tensor  # (S,)
    of_rows: Tensor  # (n,) row of each token
    of_columns: Tensor  # (n,)
    of_steps: Tensor  # (n,) its step
    tokens: Tensor  # (S,) tokens in each step


def _steps(batch: TrainBatch) -> _Steps:
    step_id = _required(batch, "step_id")
    of_rows, of_columns = torch.nonzero(batch.mask & (step_id >= 0), as_tuple=True)
    ids = step_id[of_rows, of_columns]
    width = int(ids.max()) + 1 if len(ids) else 1
    keys, of_steps, tokens = torch.unique(of_rows * width + ids, return_inverse=True, return_counts=True)
    return _Steps(keys // width, of_rows, of_columns, of_steps, tokens)


def _mean_of_steps(values: Tensor, steps: _Steps) -> Tensor:
    """(S,) mean over the tokens of each step."""
    total = torch.zeros(len(steps.row), dtype=values.dtype, device=values.device)
    return total.index_add(0, steps.of_steps, values[steps.of_rows, steps.of_columns]) / steps.tokens


def _at_tokens(steps: _Steps, advantages: Tensor, scale: Tensor, bonus: Tensor) -> Tensor:
    return advantages[steps.of_rows, steps.of_columns] * scale[steps.of_steps] + bonus[steps.of_steps]


def _center(modulated: Tensor, steps: _Steps, center: Literal["steps", "rows", "none"]) -> Tensor | float:
    if center == "none":
        return 0.0
    if center == "steps":
        return modulated.mean()
    _, inverse, count = torch.unique(steps.row, return_inverse=True, return_counts=True)
    per_row = (
        torch.zeros(len(count), dtype=modulated.dtype, device=modulated.device).index_add(
            0, inverse, modulated
        )
        / count
    )
    return per_row.mean()


def _required(batch: TrainBatch, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        remedy = (
            "no completion has turns and none was cut into lines"
            if name == "step_id"
            else "the learner did not compute it"
        )
        raise ValueError(f"control empg needs {name}, which the batch lacks: {remedy}")
    return value.detach()
