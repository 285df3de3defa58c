"""PACED: distillation on prompts at which the student sometimes succeeds.

Its two stages are loss terms; the control selects the rows on which they act.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import AGGREGATE, EXTRA_SAMPLES, LOSS_TERM, NEEDS_CORRECT, PER_UPDATE
from rltrain.registry import method
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY

__all__ = ["paced", "paced_weight", "smoothed_pass_rate"]


@method(
    "paced",
    arxiv="2603.11178",
    traits={
        PER_UPDATE,
        NEEDS_CORRECT,
        EXTRA_SAMPLES("answer"),
        LOSS_TERM("teacher_text"),
        LOSS_TERM("kdrl"),
        AGGREGATE("seq_mean_token_mean"),
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
    """Marks each prompt's rows with a weight that is largest where its pass rate p is in the middle,
    arXiv:2603.11178.

    Formula: mark ``w / mean w``, ``w = p^alpha (1 - p)^beta``

    p is the share of right completions among the policy's graded ones in the batch, (c + 1/2) / (K + 1) with
    ``smooth``; a prompt without any gets weight 0. ``extra["teacher_text"]`` marks the rows of the answer
    source, which hold the teacher's text, for the forward KL; ``extra["kdrl"]`` marks the policy's own rows,
    for the reverse KL. Each mark is scaled by the number of the batch's rows divided by the number of marked
    rows, so that with the aggregate ``seq_mean_token_mean`` a term is the mean over its own rows of w times
    the row's token mean. normalise: how the weights are normalised over the prompts of the optimizer batch
    (all ranks), as in ``paced_weight``; alpha and beta as there.
    """
    if batch.correct is None:
        raise ValueError(
            "paced needs to know which completions are correct, and no reward function reports it"
        )
    ids, prompt = torch.unique(batch.group, return_inverse=True)
    graded = (batch.source == SOURCE_POLICY) & ~batch.correct.isnan()
    rollouts = torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add(
        0, prompt[graded], torch.ones_like(prompt[graded], dtype=torch.float64)
    )
    right = torch.zeros_like(rollouts).index_add(0, prompt[graded], batch.correct[graded].double())
    rate = smoothed_pass_rate(right, rollouts) if smooth else right / rollouts.clamp(min=1)
    known = rollouts > 0
    weight = torch.zeros_like(rate)
    weight[known] = paced_weight(rate[known], alpha=alpha, beta=beta, normalise=normalise)

    rows = batch.mask.any(dim=1)
    marks: dict[str, Tensor] = {}
    for name, source in (("teacher_text", SOURCE_DATASET), ("kdrl", SOURCE_POLICY)):
        acting = rows & (batch.source == source)
        scale = int(rows.sum()) / max(int(acting.sum()), 1)
        marks[name] = (weight[prompt] * acting * scale).to(batch.weights.dtype)[:, None] * batch.mask

    return batch.with_extra(**marks).with_metrics(
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

    The weight multiplies the prompt's token-mean KL to the teacher: forward on the teacher's text, then
    reverse on the student's. It is largest at alpha / (alpha + beta), and exactly 0 for prompts at which the
    student always or never succeeds. normalise: over the batch, to mean 1 (our choice, which keeps the
    learning rate's meaning), to sum 1, or not at all; weights that are all 0 stay 0.
    """
    if bool(((pass_rate < 0) | (pass_rate > 1) | pass_rate.isnan()).any()):
        raise ValueError("paced: a pass rate lies outside [0, 1]")
    weight = pass_rate.detach() ** alpha * (1 - pass_rate.detach()) ** beta
    total = weight.sum()
    if normalise == "none" or not total > 0:
        return weight
    return weight / total * (len(weight) if normalise == "mean1" else 1)


def smoothed_pass_rate(correct: Tensor, rollouts: Tensor | int) -> Tensor:
    """(N,) ``(c + 1/2) / (K + 1)``: never exactly 0 or 1, so that no prompt is lost.

    The alternative c / K biases ``p (1 - p)`` downwards by a K-th of its value.
    """
    return (correct + 0.5) / (rollouts + 1)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
