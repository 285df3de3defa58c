"""Advantages against an answer that the policy did not write: the reference model's (AAPO) or the data set's
(GRAO).

Rows of one prompt share their group id; ``source`` says who wrote them (``types.samples.SOURCE_*``). Ungraded rows (NaN)
take no part.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import as_float
from rltrain.registry import method
from rltrain.tensor_ops import segment_count, segment_mean, segment_std
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY, SOURCE_REFERENCE

__all__ = ["aapo", "grao"]


@method("aapo", arxiv="2505.14264", needs={"source"}, traits={"extra_samples:reference"})
def aapo(
    rewards: Tensor,
    group: Tensor,
    *,
    source: Tensor,
    low: float = -0.2,
    high: float = 0.28,
    scale: Literal["none", "group"] = "none",
    reference: Literal["paired", "mean"] = "paired",
    eps: float = 1e-4,
) -> Tensor:
    """AAPO: the group-relative advantage plus ``clip(R - R_ref, low, high)``, arXiv:2505.14264. Returns (B,);
    0 off the policy's source.

    R_ref is the reward of a completion of the frozen reference model for the same prompt: a margin
    ("momentum" in the paper, yet nothing is carried over steps) that keeps a signal in groups whose rewards
    are all equal. reference "paired": one reference completion for each of the policy's, in row order
    (released); "mean": the mean over the prompt's, which has less variance. A row whose reference could not
    be graded has no margin. scale "group" divides the first part by std + eps (ddof 1); the released
    configurations do not. The loss is ``reinforce``: no ratio, so one update per rollout. Raises ValueError
    for a prompt with another number of reference completions than of the policy's, where they are to be
    paired.
    """
    rewards, own = as_float(rewards), source == SOURCE_POLICY
    margin = torch.zeros_like(rewards)
    margin[own] = (
        (rewards[own] - _reference_rewards(rewards, group, source, reference))
        .clamp(low, high)
        .nan_to_num(0.0)
    )
    graded = own & ~rewards.isnan()
    values, ids = rewards[graded], group[graded]
    relative = values - segment_mean(values, ids)
    if scale == "group":
        relative = relative / (segment_std(values, ids) + eps)
    advantages = torch.zeros_like(rewards)
    advantages[graded] = relative + margin[graded]
    return advantages


@method(
    "grao",
    arxiv="2508.07750",
    needs={"source", "mask"},
    traits={"extra_samples:answer", "policy_loss:reinforce", "aggregate:seq_mean_token_mean"},
)
def grao(
    rewards: Tensor,
    group: Tensor,
    *,
    source: Tensor,
    mask: Tensor,
    beta: float = 0.5,
    lam: float = 0.6,
    statistics: Literal["joint", "samples"] = "joint",
    eps: float = 1e-6,
) -> Tensor:
    """GRAO: imitate the data set's answer y, reinforce good samples o, pull the two apart, arXiv:2508.07750.
    Returns (B,).

    With J the mean log-prob over a row's tokens and A = (R - mean) / (std + eps) (population) the objective
    of a prompt, ``mean_i A_i J(o_i) + beta A_y J(y) + lam mean_i A_i (J(o_i) - J(y))``, weighs J(o_i) by (1 +
    lam) A_i / G and J(y) by beta A_y - lam mean_i A_i: ``grao_weights``. What is returned are these weights,
    scaled so that ``reinforce`` under ``seq_mean_token_mean`` is exactly minus the objective's mean over
    prompts (one update per rollout: there is no ratio). statistics: mean and std over samples and answer
    ("joint", as the paper's text says), or over the samples alone ("samples", as its formula prints, where
    lam does nothing to y). The answer's row is of the source ``types.SOURCE_DATASET`` and is graded like a sample;
    where it was not, or is missing, its terms are. Other sources get 0.
    """
    weights, counted = grao_weights(as_float(rewards), group, source, mask, beta, lam, statistics, eps)
    rows = int((mask.bool().any(1) & ~rewards.isnan()).sum())
    return weights * (rows / max(len(torch.unique(group[counted])), 1))


def grao_weights(
    rewards: Tensor,
    group: Tensor,
    source: Tensor,
    mask: Tensor,
    beta: float,
    lam: float,
    statistics: Literal["joint", "samples"],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(B,) what GRAO's objective of a prompt multiplies each row's mean log-prob with, and (B,) bool:
    the rows that take part.
    """
    counted = ~rewards.isnan() & mask.bool().any(1) & ((source == SOURCE_POLICY) | (source == SOURCE_DATASET))
    values, answers = rewards[counted], source[counted] == SOURCE_DATASET
    prompt = torch.unique(group[counted], return_inverse=True)[1]
    side = 2 * prompt + answers.to(torch.int64)
    alone = answers & (segment_count(side) == segment_count(prompt))  # an answer without samples
    if statistics == "joint":
        relative = (values - segment_mean(values, prompt)) / (segment_std(values, prompt, ddof=0) + eps)
    else:
        mean, std = (
            _of_the_samples(found, prompt, answers)
            for found in (segment_mean(values, side), segment_std(values, side, ddof=0))
        )
        relative = torch.where(alone, torch.zeros_like(values), (values - mean) / (std + eps))
    rows = segment_count(side).to(values.dtype)
    pull = _of_the_samples(segment_mean(relative, side), prompt, answers)
    weights = torch.zeros_like(rewards)
    weights[counted] = torch.where(answers, beta * relative - lam * pull, (1 + lam) * relative) / rows
    return weights, counted


def _reference_rewards(
    rewards: Tensor, group: Tensor, source: Tensor, reference: Literal["paired", "mean"]
) -> Tensor:
    """(b,) for the policy's rows, in row order: the reward of the reference completion each is
    compared with; NaN without one.
    """
    own, theirs = group[source == SOURCE_POLICY], group[source == SOURCE_REFERENCE]
    found = rewards[source == SOURCE_REFERENCE]
    if reference == "mean":
        kept = ~found.isnan()
        together = torch.cat([own, theirs[kept]])
        is_reference = torch.arange(len(together), device=group.device) >= len(own)
        prompt = torch.unique(together, return_inverse=True)[1]
        total = torch.zeros(len(together), dtype=rewards.dtype, device=group.device).index_add(
            0, prompt[is_reference], found[kept]
        )
        count = torch.bincount(prompt[is_reference], minlength=len(together))
        return (total / count)[prompt[: len(own)]]  # 0 / 0 is NaN: no reference, no margin
    if not torch.equal(own.sort().values, theirs.sort().values):
        raise ValueError(
            f"aapo pairs each completion with one of the reference model, but {len(own)} rows of the policy "
            "came with "
            f"{len(theirs)} of the reference; sample rollout.n of both for every prompt, or set "
            "advantage.reference to mean"
        )
    paired = torch.empty_like(rewards[source == SOURCE_POLICY])
    paired[own.sort(stable=True).indices] = found[theirs.sort(stable=True).indices]
    return paired


def _of_the_samples(found: Tensor, prompt: Tensor, answers: Tensor) -> Tensor:
    """(b,) a number of each prompt's samples at every row of the prompt, from ``found (b,)``; 0 for
    one without samples.
    """
    per_prompt = torch.zeros(
        int(prompt.max()) + 1 if len(prompt) else 0, dtype=found.dtype, device=found.device
    )
    per_prompt[prompt[~answers]] = found[~answers]
    return per_prompt[prompt]
