"""PACED: distillation where the student sometimes succeeds.

Its two halves are loss terms, the control says on which rows they act.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY

__all__ = ["paced", "paced_weight", "smoothed_pass_rate"]


@method(
    "paced",
    arxiv="2603.11178",
    traits={
        "per_update",
        "needs_correct",
        "extra_samples:answer",
        "loss_term:teacher_text",
        "loss_term:kdrl",
        "aggregate:seq_mean_token_mean",
    },
)
def paced(
    batch: TrainBatch,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalise: Literal["none", "mean1", "sum1"] = "mean1",
    smooth: bool = False,
) -> TrainBatch:
    """Marks each prompt's rows with ``p^alpha (1 - p)^beta`` of its pass rate p, arXiv:2603.11178.

    p is the share of right ones among the policy's graded completions in the batch, (c + 1/2) / (K + 1) with
    ``smooth``; a prompt without any weighs 0. ``extra["teacher_text"]`` marks the rows of the answer source,
    which hold the teacher's text, for the forward KL; ``extra["kdrl"]`` the policy's own, for the reverse KL.
    Each is scaled by the batch's rows over the rows it acts on, so that with the aggregate
    ``seq_mean_token_mean`` a term is the mean over its own rows of w times the row's token mean. normalise:
    of the weights, over the prompts of the optimizer batch (all ranks), as in ``paced_weight``.
    """
    if batch.correct is None:
        raise ValueError(
            "paced needs to know which completions are correct, and no reward function reports it"
        )
    ids, of = torch.unique(batch.group, return_inverse=True)
    graded = (batch.source == SOURCE_POLICY) & ~batch.correct.isnan()
    rollouts = torch.zeros(len(ids), dtype=torch.float64).index_add(
        0, of[graded], torch.ones(int(graded.sum()), dtype=torch.float64)
    )
    right = torch.zeros_like(rollouts).index_add(0, of[graded], batch.correct[graded].double())
    rate = smoothed_pass_rate(right, rollouts) if smooth else right / rollouts.clamp(min=1)
    known = rollouts > 0
    weight = torch.zeros_like(rate)
    weight[known] = paced_weight(rate[known], alpha=alpha, beta=beta, normalise=normalise)
    rows = batch.mask.any(dim=1)
    marks: dict[str, Tensor] = {}
    for name, source in (("teacher_text", SOURCE_DATASET), ("kdrl", SOURCE_POLICY)):
        acting = rows & (batch.source == source)
        scale = int(rows.sum()) / max(int(acting.sum()), 1)
        marks[name] = (weight[of] * acting * scale).to(batch.weights.dtype)[:, None] * batch.mask
    with_metrics = batch.with_extra(**marks)
    return with_metrics.with_metrics(
        paced_pass_rate=_mean(rate[known]), paced_weightless=_mean((weight == 0).double())
    )


def paced_weight(
    pass_rate: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalise: Literal["none", "mean1", "sum1"] = "mean1",
) -> Tensor:
    """(N,) ``p^alpha (1 - p)^beta`` of each prompt's pass rate, detached, arXiv:2603.11178; ``0^0`` is 1.

    Multiplies the prompt's token-mean KL to the teacher: forward on the teacher's text, then reverse on the
    student's. Largest at alpha / (alpha + beta), exactly 0 for prompts that always or never succeed.
    normalise: over the batch in hand, to mean 1 (ours: the learning rate keeps its meaning), to sum 1, or
    not; weights that are all 0 stay so.
    """
    if bool(((pass_rate < 0) | (pass_rate > 1) | pass_rate.isnan()).any()):
        raise ValueError("paced: a pass rate lies outside [0, 1]")
    weight = pass_rate.detach() ** alpha * (1 - pass_rate.detach()) ** beta
    total = weight.sum()
    if normalise == "none" or not total > 0:
        return weight
    return weight / total * (len(weight) if normalise == "mean1" else 1)


def smoothed_pass_rate(correct: Tensor, rollouts: Tensor | int) -> Tensor:
    """(N,) ``(c + 1/2) / (K + 1)``: never exactly 0 or 1, so that no prompt is lost. An option beside c / K,
    which biases ``p (1 - p)`` downwards by its K-th part."""
    return (correct + 0.5) / (rollouts + 1)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
