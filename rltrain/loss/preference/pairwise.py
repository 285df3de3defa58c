"""Further losses on the log-ratios ``u = log pi(y|x) - log pi_ref(y|x)`` of a pair: EXO, SPPO, APO, DiscoPOP
and BCO's pair form.

u is a sum over the completion's tokens. All take PolicyPairs and a PairBatch and return values (N,).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.needs import MARGINS, P_CHOSEN, PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["apo", "bco_pair", "discopop", "exo", "sppo", "sppo_soft"]


@method("exo", arxiv="2402.00856", needs={REF_LOGP}, traits={PAIRS})
def exo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, flip_rate: float = 1e-3) -> ExampleLoss:
    """EXO: reverse KL from the policy's choice among the two to the label's, arXiv:2402.00856. Values (N,).

    Formula: ``q ln(q / (1 - e)) + (1 - q) ln((1 - q) / e)``, ``q = sigmoid(z)``

    beta as in ``dpo``. flip_rate: e, the probability that the label is wrong, above 0 and below 1/2, since
    the KL to a certain label is infinite.
    """
    if not 0 < flip_rate < 0.5:
        raise ValueError(f"exo: flip_rate is {flip_rate}, expected (0, 0.5): at 0 the KL is infinite")
    chosen, rejected = log_ratios(policy, batch)
    logit = beta * (chosen - rejected)
    win = torch.sigmoid(logit) * (logsigmoid(logit) - math.log1p(-flip_rate))
    lose = torch.sigmoid(-logit) * (logsigmoid(-logit) - math.log(flip_rate))
    return ExampleLoss(win + lose, pair_metrics(policy, beta * chosen, beta * rejected))


@method("sppo", arxiv="2405.00675", needs={REF_LOGP}, traits={PAIRS})
def sppo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 1e-3) -> ExampleLoss:
    """SPPO with certain labels: each log-ratio is regressed on its own target, arXiv:2405.00675. Values (N,).

    Formula: ``(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2``

    beta: 1 / eta of the paper, whose eta is 1000. The reference is the policy that sampled the pairs, so make
    an iteration of it (``nash_mp`` and ``inpo`` keep the previous one). Nothing compares the two sides with
    each other, so the chosen answer's likelihood cannot fall along.
    """
    chosen, rejected = log_ratios(policy, batch)
    half = 0.5 / beta
    values = (chosen - half).square() + (rejected + half).square()
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("sppo_soft", arxiv="2405.00675", needs={REF_LOGP, P_CHOSEN}, traits={PAIRS, MARGINS})
def sppo_soft(policy: PolicyPairs, batch: PairBatch, *, beta: float = 1e-3) -> ExampleLoss:
    """SPPO: each log-ratio is regressed on a target from a judge's probability p, arXiv:2405.00675. Values
    (N,).

    Formula: ``(u_w - (p - 1/2) / beta)^2 + (u_l + (p - 1/2) / beta)^2``, ``p = p_chosen``

    p is the data's p_chosen, which the paper estimates with PairRM. beta as in ``sppo``, to which it is equal
    at p = 1.
    """
    if batch.p_chosen is None:
        raise ValueError("sppo_soft: the batch has no p_chosen; the data needs a column p_chosen")
    chosen, rejected = log_ratios(policy, batch)
    target = ((batch.p_chosen - 0.5) / beta).to(chosen.dtype)
    values = (chosen - target).square() + (rejected + target).square()
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("apo", arxiv="2408.06266", needs={REF_LOGP}, traits={PAIRS})
def apo(
    policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, form: Literal["zero", "down"] = "zero"
) -> ExampleLoss:
    """APO: anchored preference optimisation, which says where each likelihood goes and not only how they
    differ, arXiv:2408.06266. Values (N,).

    Formula: zero: ``1 - sigmoid(beta u_w) + sigmoid(beta u_l)``; down: ``sigmoid(beta u_w) + 1 - sigmoid(z)``

    form: "zero" is for chosen answers that are better than the policy's own: one rises, the other falls.
    "down" is for answers that are worse: both fall, the rejected one faster. beta as in ``dpo``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, batch))
    if form == "zero":
        values = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    else:
        values = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return ExampleLoss(values, pair_metrics(policy, chosen, rejected))


@method("discopop", arxiv="2406.08414", needs={REF_LOGP}, traits={PAIRS})
def discopop(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.05, tau: float = 0.05) -> ExampleLoss:
    """DiscoPOP: a mixture of DPO's loss and an exponential, which a language model proposed,
    arXiv:2406.08414. Values (N,).

    Formula: ``-(1 - g) ln sigmoid(z) + g e^-z``, ``g = sigmoid(z / tau)``

    z is DPO's logit with beta. tau: how fast the mixture goes over to the exponential as z grows. The loss is
    not convex: around z = 0 it has a local maximum.
    """
    chosen, rejected = log_ratios(policy, batch)
    logit = beta * (chosen - rejected)
    share = torch.sigmoid(logit / tau)
    values = -logsigmoid(logit) * (1 - share) + share * _exponential(-logit)
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("bco_pair", arxiv="2404.04656", needs={REF_LOGP}, traits={PAIRS})
def bco_pair(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1) -> ExampleLoss:
    """BCO on pairs, without the reward's shift, arXiv:2404.04656. Values (N,).

    Formula: ``-ln sigmoid(beta u_w) - ln sigmoid(-beta u_l)``

    TRL's ``bco_pair``. beta as in ``dpo``. The shift of the paper needs both classes of a batch: see ``bco``.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, batch))
    values = -logsigmoid(chosen) - logsigmoid(-rejected)
    return ExampleLoss(values, pair_metrics(policy, chosen, rejected))


def _exponential(values: Tensor) -> Tensor:
    """``e^values``, bounded where it would overflow and its factor is 0."""
    return values.clamp(max=80.0).exp()
