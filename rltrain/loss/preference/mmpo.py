"""Preferences with a strength: soft targets from margins (MMPO) or from a judge's probability (OSP)."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.loss.preference.dpo import soft_logistic
from rltrain.loss.preference.margins import target_probability
from rltrain.loss.preference.ratio import log_ratios, pair_metrics
from rltrain.needs import GAMMA_REQUIRED, MARGIN, MARGINS, P_CHOSEN, PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["margin_target", "mmpo", "osp", "ranked_pair_strengths", "stated_target"]


def margin_target(batch: PairBatch, gamma: float | None, loss: str) -> Tensor:
    """(N,) ``sigmoid(gamma margin)``.

    Raises ValueError without gamma, without margins, or if a margin is not finite.
    """
    if gamma is None:
        raise ValueError(
            f"{loss}: gamma has no default, because it carries the units of the scores; set it, for example "
            "to margins.gamma_for_target(margins)"
        )
    if batch.margin is None:
        raise ValueError(
            f"{loss}: the batch has no margins; the data needs score_chosen and score_rejected, or margin"
        )
    return target_probability(_require_finite(batch.margin, "margin", loss), gamma)


def stated_target(batch: PairBatch, loss: str) -> Tensor:
    """(N,) the data's own probability that chosen is better.

    Raises ValueError if it is missing or outside [0, 1].
    """
    if batch.p_chosen is None:
        raise ValueError(
            f"{loss}: the batch has no p_chosen; the data needs that column, or use mmpo with margins"
        )
    p_chosen = _require_finite(batch.p_chosen, "p_chosen", loss)
    if bool(((p_chosen < 0) | (p_chosen > 1)).any()):
        raise ValueError(
            f"{loss}: p_chosen lies between {float(p_chosen.min()):.4g} and {float(p_chosen.max()):.4g}, "
            "expected [0, 1]"
        )
    return p_chosen


@method("mmpo", arxiv="2410.03145", needs={REF_LOGP, MARGIN}, traits={PAIRS, MARGINS, GAMMA_REQUIRED})
def mmpo(
    policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.01, gamma: float | None = None
) -> ExampleLoss:
    """MMPO: DPO's cross-entropy towards a target that follows the data's margin, arXiv:2410.03145. Values
    (N,).

    Formula: ``-p ln sigmoid(z) - (1 - p) ln sigmoid(-z)``, ``p = sigmoid(gamma margin)``

    At the minimum the implicit reward's margin ``beta (u_chosen - u_rejected)`` is gamma times the data's.
    gamma must be given: it carries the units of the scores (2.2 for UltraFeedback's 1 to 10 in the authors'
    commands). beta as in ``dpo``. A negative margin prefers the rejected side, as if the pair were swapped; a
    tie trains towards a margin of 0. A missing or non-finite margin is an error; the authors' code falls back
    to DPO.
    """
    target = margin_target(batch, gamma, "mmpo")
    chosen, rejected = log_ratios(policy, batch)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"target": target}
    return ExampleLoss(soft_logistic(beta * (chosen - rejected), target), metrics)


@method("osp", arxiv="2405.14103", needs={REF_LOGP, P_CHOSEN}, traits={PAIRS, MARGINS})
def osp(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1) -> ExampleLoss:
    """Soft-preference cross-entropy: DPO's with a judge's probability p_chosen as target, arXiv:2405.14103.
    Values (N,).

    Formula: ``-p ln sigmoid(z) - (1 - p) ln sigmoid(-z)``, ``p = p_chosen``

    It has the form of ``mmpo``; only the source of the target differs. beta as in ``dpo``. p_chosen 1 is DPO.
    The form follows from the paper's abstract and the loss's name.
    """
    target = stated_target(batch, "osp")
    chosen, rejected = log_ratios(policy, batch)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"target": target}
    return ExampleLoss(soft_logistic(beta * (chosen - rejected), target), metrics)


def ranked_pair_strengths(win_rate: Tensor, *, clip: float = 1e-3) -> tuple[Tensor, Tensor]:
    """(P, 2) int64 pairs (better, worse) and (P,) their strengths, from the win rates of n answers against a
    common answer.

    ``p = sigmoid(logit s_i - logit s_j)`` with rates clipped to [clip, 1 - clip]; n judge calls give n (n -
    1) / 2 pairs. A reconstruction: arXiv:2405.14103 compares all candidates with one baseline; how it forms
    pairs is not known to us.
    """
    logit = torch.logit(win_rate.clamp(clip, 1 - clip))
    order = torch.argsort(win_rate, descending=True, stable=True)
    first, second = torch.triu_indices(win_rate.shape[0], win_rate.shape[0], offset=1)
    pairs = torch.stack([order[first], order[second]], dim=1)
    return pairs, torch.sigmoid(logit[pairs[:, 0]] - logit[pairs[:, 1]])


def _require_finite(values: Tensor, name: str, loss: str) -> Tensor:
    invalid = ~values.isfinite()
    if bool(invalid.any()):
        raise ValueError(
            f"{loss}: {int(invalid.sum())} of {values.shape[0]} pairs have no finite {name}; drop them "
            "from the data"
        )
    return values.detach()
