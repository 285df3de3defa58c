"""Pairwise losses on the policy's own likelihoods, without a reference model: SimPO, CPO and ORPO.

All take PolicyPairs and a PairBatch and return values (N,).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import pair_metrics, per_token
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import MEAN_CHOSEN_LENGTH, PAIRS, REFERENCE_FREE
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["cpo", "orpo", "simpo"]


@method("simpo", arxiv="2405.14734", traits={PAIRS, REFERENCE_FREE})
def simpo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 2.0, gamma: float = 1.0) -> ExampleLoss:
    """SimPO: log-probs per token must differ by a margin, arXiv:2405.14734. Values (N,).

    Formula: ``-ln sigmoid(beta (ln pi(w) / |w| - ln pi(l) / |l|) - gamma)``

    beta: scale of the reward, the mean log-prob per token; 2 to 2.5 in the paper. gamma: the margin by which
    rewards must differ, 0.3 to 1.6 there; TRL's ``simpo_gamma`` is the same number.
    """
    chosen = beta * per_token(policy.chosen.logp, batch.chosen)
    rejected = beta * per_token(policy.rejected.logp, batch.rejected)
    return ExampleLoss(-logsigmoid(chosen - rejected - gamma), pair_metrics(policy, chosen, rejected))


@method("cpo", arxiv="2401.08417", needs={MEAN_CHOSEN_LENGTH}, traits={PAIRS, REFERENCE_FREE})
def cpo(
    policy: PolicyPairs,
    batch: PairBatch,
    *,
    beta: float = 0.1,
    sft_weight: float = 1.0,
    sft_term: Literal["sum", "token_mean"] = "sum",
) -> ExampleLoss:
    """CPO: a contrast of the likelihoods plus the chosen answer's, arXiv:2401.08417. Values (N,).

    Formula: ``-ln sigmoid(beta (ln pi(w) - ln pi(l))) - sft_weight ln pi(w)``

    beta: temperature of the contrast, 0.1 in the paper. sft_weight multiplies the likelihood's term.
    sft_term: "sum" over an answer's tokens as in the paper's formula, or one mean over all chosen tokens of
    the optimizer batch, as in the released code and TRL, which count the prompt's tokens too.
    """
    imitation = -policy.chosen.logp
    if sft_term == "token_mean":
        imitation = imitation / statistic(batch, "mean_chosen_length", "cpo").to(imitation.dtype)
    chosen = beta * policy.chosen.logp
    rejected = beta * policy.rejected.logp
    metrics = pair_metrics(policy, chosen, rejected) | {"sft": imitation.detach()}
    return ExampleLoss(-logsigmoid(chosen - rejected) + sft_weight * imitation, metrics)


@method("orpo", arxiv="2403.07691", needs={MEAN_CHOSEN_LENGTH}, traits={PAIRS, REFERENCE_FREE})
def orpo(
    policy: PolicyPairs,
    batch: PairBatch,
    *,
    weight: float = 0.1,
    sft_term: Literal["sequence_mean", "token_mean"] = "sequence_mean",
) -> ExampleLoss:
    """ORPO: the chosen answer's negative log-likelihood plus a log odds ratio, arXiv:2403.07691. Values (N,).

    Formula: ``-ln P(w) - weight ln sigmoid(ln odds(w) - ln odds(l))``, ``odds = P / (1 - P)``, ``P = exp(ln
    pi(y|x) / |y|)``

    P is the geometric mean of an answer's token probabilities. weight: lambda of the paper. sft_term: each
    answer's mean over its tokens, as the paper writes it, or one mean over all chosen tokens of the optimizer
    batch, as in TRL, which counts the prompt's tokens too.
    """
    chosen = per_token(policy.chosen.logp, batch.chosen)
    rejected = per_token(policy.rejected.logp, batch.rejected)
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    imitation = -chosen
    if sft_term == "token_mean":
        mean_length = statistic(batch, "mean_chosen_length", "orpo").to(chosen.dtype)
        imitation = -policy.chosen.logp / mean_length
    metrics = pair_metrics(policy, weight * chosen, weight * rejected)
    metrics |= {"sft": imitation.detach(), "log_odds": log_odds.detach()}
    return ExampleLoss(imitation - weight * logsigmoid(log_odds), metrics)


def _log_complement(logp: Tensor) -> Tensor:
    """``ln(1 - e^logp)`` for logp below 0; at 0, which rounding may give, that of a number just below."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    is_small = logp < -math.log(2)
    far = torch.where(is_small, logp, -1.0)
    near = torch.where(is_small, -0.5, logp)
    return torch.where(is_small, torch.log1p(-far.exp()), (-torch.expm1(near)).log())
