"""NaPO: a negative Box-Cox transform between DPO (fast) and mean absolute error (robust to wrong labels)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import MEAN_MARGIN, PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["box_cox", "dynamic_exponent", "napo", "napo_fixed"]

SMALLEST_EXPONENT = 0.001


def box_cox(logit: Tensor, q: Tensor | float) -> Tensor:
    """(N,) ``(1 - sigmoid(z)^q) / q``: -ln sigmoid(z) in the limit q = 0, 1 - sigmoid(z) at q = 1."""
    return -torch.expm1(q * logsigmoid(logit)) / q


def dynamic_exponent(mean_margin: Tensor, sharpness: float) -> Tensor:
    """() ``q = clip(2 (1 - sigmoid(sharpness M)), 0.001, 1)``: 1 if the mean margin M is at most 0."""
    return (2 * torch.sigmoid(-sharpness * mean_margin)).clamp(SMALLEST_EXPONENT, 1)


@method("napo", arxiv="2503.17928", needs={REF_LOGP, MEAN_MARGIN}, traits={PAIRS})
def napo(
    policy: PolicyPairs,
    batch: PairBatch,
    *,
    beta: float = 0.1,
    sharpness: float = 0.5,
    margin_type: Literal["avglogp", "logp"] = "avglogp",
) -> ExampleLoss:
    """NaPO: DPO that discounts badly violated pairs, by an exponent from the optimizer batch's mean margin,
    arXiv:2503.17928. Values (N,). beta as in ``dpo``.

    Formula: ``(1 - sigmoid(z)^q) / q``, ``q = clip(2 sigmoid(-sharpness M), 0.001, 1)``, M the mean margin

    q is one number for the whole batch (all ranks), without gradient (``dynamic_exponent``). margin_type: the
    margin is of log-ratios per token ("avglogp", with sharpness 0.5 in the authors' runs) or of their sums
    ("logp", with 0.01). DPO's gradient is multiplied by ``sigmoid(z)^q``: badly violated pairs, which may be
    mislabelled, count less.
    """
    del margin_type  # the statistic mean_margin uses it
    q = dynamic_exponent(statistic(batch, "mean_margin", "napo"), sharpness).to(policy.chosen.logp.dtype)
    return _napo(policy, batch, beta, q)


@method("napo_fixed", arxiv="2503.17928", needs={REF_LOGP}, traits={PAIRS})
def napo_fixed(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, q: float = 0.5) -> ExampleLoss:
    """``napo`` with a fixed exponent q in (0, 1]: DPO in the limit 0, arXiv:2503.17928. beta as in ``dpo``.

    Formula: ``(1 - sigmoid(z)^q) / q``
    """
    if not 0 < q <= 1:
        raise ValueError(f"napo_fixed: q is {q}, expected (0, 1]; DPO is the limit at 0")
    logp = policy.chosen.logp
    return _napo(policy, batch, beta, torch.as_tensor(q, dtype=logp.dtype, device=logp.device))


def _napo(policy: PolicyPairs, batch: PairBatch, beta: float, q: Tensor) -> ExampleLoss:
    chosen, rejected = log_ratios(policy, batch)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"q": q.expand(chosen.shape)}
    return ExampleLoss(box_cox(beta * (chosen - rejected), q), metrics)
