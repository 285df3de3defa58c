"""Advantages relative to an answer that the policy did not write: the reference model's (AAPO) or the data
set's (GRAO).

Rows of one prompt share their group id; ``source`` says where a row comes from (``types.samples.SOURCE_*``).
Ungraded rows (NaN) are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import as_float
from rltrain.needs import AGGREGATE, EXTRA_SAMPLES, MASK, POLICY_LOSS, SOURCE
from rltrain.registry import method
from rltrain.tensor_ops import segment_count, segment_mean, segment_std
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY, SOURCE_REFERENCE

__all__ = ["aapo", "grao"]


@method("aapo", arxiv="2505.14264", needs={SOURCE}, traits={EXTRA_SAMPLES("reference")})
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
    """AAPO: the group-relative advantage plus the bounded lead over the reference model, arXiv:2505.14264.
    Returns (B,); 0 for rows of other sources.

    Formula: ``R - mean + clip(R - R_ref, low, high)``

    R_ref is the reward of a completion by the frozen reference model for the same prompt. The margin
    ("momentum" in the paper, though nothing is carried over steps) keeps a signal in groups whose rewards are
    all equal. reference "paired": one reference completion for each of the policy's, in row order (released);
    "mean": the mean over the prompt's reference completions, which has less variance. A row whose reference
    could not be graded has no margin. scale "group" divides the first part by std + eps (ddof 1); the
    released configurations do not. The loss is ``reinforce``, which has no ratio, so make one update per
    rollout. Raises ValueError if a prompt has different numbers of completions to pair.
    """
    rewards = as_float(rewards)
    is_policy = source == SOURCE_POLICY
    difference = rewards[is_policy] - _reference_rewards(rewards, group, source, reference)
    margin = torch.zeros_like(rewards)
    margin[is_policy] = difference.clamp(low, high).nan_to_num(0.0)

    graded = is_policy & ~rewards.isnan()
    values = rewards[graded]
    ids = group[graded]
    relative = values - segment_mean(values, ids)
    if scale == "group":
        relative = relative / (segment_std(values, ids) + eps)
    advantages = torch.zeros_like(rewards)
    advantages[graded] = relative + margin[graded]
    return advantages


@method(
    "grao",
    arxiv="2508.07750",
    needs={SOURCE, MASK},
    traits={EXTRA_SAMPLES("answer"), POLICY_LOSS("reinforce"), AGGREGATE("seq_mean_token_mean")},
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
    """GRAO: imitate the data set's answer y, reinforce good samples o, separate the two, arXiv:2508.07750.
    Returns (B,).

    Formula: ``mean_i A_i J(o_i) + beta A_y J(y) + lam mean_i A_i (J(o_i) - J(y))`` is maximised, with ``A =
    (R - mean) / (std + eps)``

    J is the mean log-prob over a row's tokens; std is the population's. The objective of a prompt weights
    J(o_i) by (1 + lam) A_i / G and J(y) by beta A_y - lam mean_i A_i: ``grao_weights``. The advantages are
    these weights, scaled so that ``reinforce`` under ``seq_mean_token_mean`` is exactly minus the objective's
    mean over prompts (one update per rollout: there is no ratio). statistics: mean and std over samples and
    answer ("joint", as the paper's text says), or over the samples alone ("samples", as its formula prints,
    where lam does not affect y). The answer's row has the source ``types.SOURCE_DATASET`` and is graded like
    a sample; if it is missing or ungraded, its terms are left out. Other sources get 0.
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
    """(B,) weight of each row's mean log-prob in GRAO's objective of its prompt, and (B,) bool: the rows that
    count.
    """
    counted = ~rewards.isnan() & mask.bool().any(1) & ((source == SOURCE_POLICY) | (source == SOURCE_DATASET))
    values = rewards[counted]
    answers = source[counted] == SOURCE_DATASET
    prompt = torch.unique(group[counted], return_inverse=True)[1]
    side = 2 * prompt + answers.to(torch.int64)
    has_no_samples = answers & (segment_count(side) == segment_count(prompt))

    if statistics == "joint":
        relative = (values - segment_mean(values, prompt)) / (segment_std(values, prompt, ddof=0) + eps)
    else:
        mean = _sample_statistic(segment_mean(values, side), prompt, answers)
        std = _sample_statistic(segment_std(values, side, ddof=0), prompt, answers)
        relative = torch.where(has_no_samples, torch.zeros_like(values), (values - mean) / (std + eps))

    rows = segment_count(side).to(values.dtype)
    pull = _sample_statistic(segment_mean(relative, side), prompt, answers)
    weights = torch.zeros_like(rewards)
    weights[counted] = torch.where(answers, beta * relative - lam * pull, (1 + lam) * relative) / rows
    return weights, counted


def _reference_rewards(
    rewards: Tensor, group: Tensor, source: Tensor, reference: Literal["paired", "mean"]
) -> Tensor:
    """(b,) for the policy's rows, in row order: the reward of the reference completion that each is compared
    with; NaN if there is none.
    """
    policy_group = group[source == SOURCE_POLICY]
    reference_group = group[source == SOURCE_REFERENCE]
    reference_reward = rewards[source == SOURCE_REFERENCE]
    if reference == "mean":
        graded = ~reference_reward.isnan()
        groups = torch.cat([policy_group, reference_group[graded]])
        prompt = torch.unique(groups, return_inverse=True)[1]
        policy_prompt = prompt[: len(policy_group)]
        reference_prompt = prompt[len(policy_group) :]
        zeros = torch.zeros(len(groups), dtype=rewards.dtype, device=group.device)
        total = zeros.index_add(0, reference_prompt, reference_reward[graded])
        count = torch.bincount(reference_prompt, minlength=len(groups))
        return (total / count)[policy_prompt]  # 0 / 0 is NaN: no reference, no margin

    if not torch.equal(policy_group.sort().values, reference_group.sort().values):
        raise ValueError(
            f"aapo pairs each completion with one of the reference model, but {len(policy_group)} rows of "
            f"the policy came with {len(reference_group)} of the reference; sample rollout.n of both for "
            "every prompt, or set advantage.reference to mean"
        )
    paired = torch.empty_like(rewards[source == SOURCE_POLICY])
    paired[policy_group.sort(stable=True).indices] = reference_reward[
        reference_group.sort(stable=True).indices
    ]
    return paired


def _sample_statistic(statistic: Tensor, prompt: Tensor, answers: Tensor) -> Tensor:
    """(b,) the ``statistic (b,)`` of each prompt's samples, at every row of the prompt; 0 if it has none."""
    prompts = int(prompt.max()) + 1 if len(prompt) else 0
    per_prompt = torch.zeros(prompts, dtype=statistic.dtype, device=statistic.device)
    per_prompt[prompt[~answers]] = statistic[~answers]
    return per_prompt[prompt]
