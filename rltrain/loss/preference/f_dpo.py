"""f-DPO: DPO under divergences other than the reverse KL."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.needs import PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["divergence_score", "f_dpo"]

LARGEST_EXPONENT = 80.0  # exp(80) is still well inside the range of float32

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def divergence_score(
    log_ratio: Tensor, divergence: Divergence, alpha_forward: float
) -> tuple[Tensor, Tensor]:
    """(N,) ``f'(pi / pi_ref)`` without additive constants, and (N,) bool: its exponent was clamped at 80 and
    so has no gradient.
    """
    if divergence == "reverse_kl":
        return log_ratio, log_ratio != log_ratio
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratio), log_ratio != log_ratio
    if divergence == "forward_kl":
        exponent = -log_ratio
        return -exponent.clamp(max=LARGEST_EXPONENT).exp(), exponent > LARGEST_EXPONENT
    exponent = -alpha_forward * log_ratio
    return -exponent.clamp(max=LARGEST_EXPONENT).expm1() / alpha_forward, exponent > LARGEST_EXPONENT


@method("f_dpo", arxiv="2309.16240", needs={REF_LOGP}, traits={PAIRS})
def f_dpo(
    policy: PolicyPairs,
    batch: PairBatch,
    *,
    beta: float = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha_forward: float = 0.5,
) -> ExampleLoss:
    """DPO under another divergence than the reverse KL, arXiv:2309.16240. Values (N,).

    Formula: ``-ln sigmoid(beta g(u_w) - beta g(u_l))``, ``g(u) = f'(e^u)``: reverse_kl ``u``, forward_kl
    ``-e^-u``, js ``ln 2 + ln sigmoid(u)``, alpha ``(1 - e^(-a u)) / a``

    divergence: reverse_kl (which is DPO), forward_kl, js or alpha. alpha_forward is a, in (0, 1]: the limit 0
    is the reverse KL, 1 the forward KL, as in the paper. TRL's f_alpha_divergence_coef is 1 - a. beta does
    not transfer between divergences: js and forward_kl rewards are bounded above (the authors use 0.9, 0.3
    and 0.03 for reverse, js and forward). Rows whose exponent exceeds 80 are clamped, have no gradient and
    are counted. The logged reward is ``beta g(u)``; the authors' alpha reward omits the constant beta / a,
    which does not change the loss.
    """
    if not 0 < alpha_forward <= 1:
        raise ValueError(
            f"f_dpo: alpha_forward is {alpha_forward}, expected (0, 1]; reverse KL is divergence: reverse_kl"
        )
    chosen, rejected = log_ratios(policy, batch)
    chosen, chosen_clamped = divergence_score(chosen, divergence, alpha_forward)
    rejected, rejected_clamped = divergence_score(rejected, divergence, alpha_forward)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected)
    metrics["clamped"] = (chosen_clamped | rejected_clamped).to(chosen.dtype)
    return ExampleLoss(-logsigmoid(beta * (chosen - rejected)), metrics)
