"""DCO: a likelihood loss that limits confidence, for pass@N."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltrain.loss.preference.ratio import per_token
from rltrain.needs import COLUMN, LABELS, REFERENCE_FREE
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PolicySequences

__all__ = ["coverage", "dco", "dco_pass_rate"]

TINY = -30.0  # ln p below which ln(1 - (1 - p)^n) is ln(n p) to float64


def coverage(logp: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(N,) float64 each, without gradient: ``L = -ln(1 - (1 - p)^n)`` and ``F = -dL/d ln p``, for p =
    exp(logp).

    F = n p (1 - p)^(n-1) / (1 - (1 - p)^n) goes to 1 as p goes to 0, and falls to 0 at p = 1 (for n = 1 it is
    exactly 1 throughout).
    """
    logp = logp.detach().double()
    if n == 1:
        return -logp, torch.ones_like(logp)
    log_miss = torch.log1p(-logp.exp())  # ln(1 - p), -inf at p = 1
    log_hits = math.log(n) + torch.where(logp < TINY, logp, torch.log(-log_miss))  # ln(-n ln(1 - p))
    hits = log_hits.exp()
    loss = -torch.where(log_hits < TINY, log_hits, torch.log(-torch.expm1(-hits)))
    return loss, torch.exp(math.log(n) + logp + (n - 1) * log_miss + loss)


@method("dco", arxiv="2502.07154", traits={LABELS, REFERENCE_FREE})
def dco(
    policy: PolicySequences,
    batch: LabelBatch,
    *,
    n: int = 64,
    gradient: Literal["exact", "token_mean"] = "exact",
) -> ExampleLoss:
    """DCO: the negative log-probability of a hit among n samples, arXiv:2502.07154. Values (N,).

    Formula: ``-ln(1 - (1 - p)^n)``, ``p = pi(y|x)``

    n: the N of the pass@N to train for; 1 is the negative log-likelihood (and the released code's default).
    gradient: "exact" is the loss above; "token_mean" is the authors' code, ``F`` (detached) times the mean of
    the negative log-likelihood over the completion's tokens. Long completions have p near 0, hence F near 1:
    it takes effect once answers are confident. F is exact; the authors use a series below n p = 0.1.
    """
    _check_n("dco", n)
    loss, factor = (part.to(policy.logp.dtype) for part in coverage(policy.logp, n))
    if gradient == "token_mean":
        return ExampleLoss(factor * per_token(-policy.logp, batch.completion), {"factor": factor})
    return ExampleLoss(loss - factor * (policy.logp - policy.logp.detach()), {"factor": factor})


@method("dco_pass_rate", arxiv="2502.07154", needs={COLUMN("pass_rate")}, traits={LABELS, REFERENCE_FREE})
def dco_pass_rate(
    policy: PolicySequences,
    batch: LabelBatch,
    *,
    n: int = 64,
    likelihood: Literal["token_mean", "sum"] = "token_mean",
) -> ExampleLoss:
    """DCO for chains of thought: the negative log-likelihood, weighted by a sampled success rate,
    arXiv:2502.07154. Values (N,).

    Formula: ``-F ln pi(y|x) / |y|``, ``F = n p (1 - p)^(n - 1) / (1 - (1 - p)^n)``, p the pass rate

    The pass rate is the data's column pass_rate (the share of right answers among the current model's samples
    for the prompt). likelihood: the completion's mean over tokens as in the authors' default, or its sum. The
    authors replace examples whose pass rate is 0.1 or more before they make a batch.
    """
    _check_n("dco_pass_rate", n)
    rate = batch.columns["pass_rate"]
    if bool(((rate < 0) | (rate > 1) | rate.isnan()).any()):
        raise ValueError("dco_pass_rate: column pass_rate holds values outside [0, 1]")
    factor = torch.where(rate > 0, coverage(rate.double().clamp(min=1e-300).log(), n)[1], 1.0).to(
        policy.logp.dtype
    )
    nll = -policy.logp if likelihood == "sum" else per_token(-policy.logp, batch.completion)
    return ExampleLoss(factor * nll, {"factor": factor})


def _check_n(loss: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{loss}: n is {n}, expected at least 1; 1 is the plain negative log-likelihood")
