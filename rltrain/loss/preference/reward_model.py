"""Reward models with a scalar head on the last token: from pairs (Bradley-Terry) or from single outcomes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.dpo import soft_logistic
from rltrain.loss.preference.mmpo import margin_target, stated_target
from rltrain.loss.preference.ratio import reward_metrics
from rltrain.loss.preference.statistics import labels
from rltrain.needs import GAMMA_REQUIRED, LABEL, LABELS, MARGIN, MARGINS, P_CHOSEN, PAIRS, SCALAR_HEAD
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PairBatch, RewardPairs

__all__ = ["bradley_terry", "bradley_terry_margin", "bradley_terry_mmpo", "bradley_terry_soft", "orm"]


@method("bradley_terry", arxiv="2203.02155", traits={PAIRS, SCALAR_HEAD})
def bradley_terry(reward: RewardPairs, batch: PairBatch, *, centre: float = 0.0) -> ExampleLoss:
    """Reward model from pairs, with the rewards' mean near 0, as in arXiv:2203.02155. Values (N,).

    Formula: ``-ln sigmoid(r_w - r_l) + centre (r_w + r_l)^2``

    The first part does not change if a constant is added to all rewards of a prompt; centre (0.01 is usual)
    pulls their mean to 0.
    """
    del batch
    return _pairwise(reward, -logsigmoid(_difference(reward)), centre)


@method("bradley_terry_margin", arxiv="2307.09288", needs={MARGIN}, traits={PAIRS, SCALAR_HEAD, MARGINS})
def bradley_terry_margin(reward: RewardPairs, batch: PairBatch, *, centre: float = 0.0) -> ExampleLoss:
    """Reward model from pairs whose rewards must differ by more than the data's margin, arXiv:2307.09288.
    Values (N,).

    Formula: ``-ln sigmoid(r_w - r_l - margin) + centre (r_w + r_l)^2``

    This is not MMPO, whose margin is a soft target (``bradley_terry_mmpo``); other libraries choose between
    the two by the presence of a column. centre as in ``bradley_terry``.
    """
    if batch.margin is None:
        raise ValueError(
            "bradley_terry_margin: the batch has no margins; the data needs score_chosen and score_rejected, "
            "or margin"
        )
    if bool((~batch.margin.isfinite()).any()):
        raise ValueError(
            "bradley_terry_margin: a margin is not a finite number; drop such pairs from the data"
        )
    return _pairwise(reward, -logsigmoid(_difference(reward) - batch.margin), centre)


@method(
    "bradley_terry_mmpo",
    arxiv="2410.03145",
    needs={MARGIN},
    traits={PAIRS, SCALAR_HEAD, MARGINS, GAMMA_REQUIRED},
)
def bradley_terry_mmpo(
    reward: RewardPairs, batch: PairBatch, *, gamma: float | None = None, centre: float = 0.0
) -> ExampleLoss:
    """Reward model whose reward differences follow the data's margins, arXiv:2410.03145.

    Formula: ``-p ln sigmoid(x) - (1 - p) ln sigmoid(-x) + centre (r_w + r_l)^2``, ``x = r_w - r_l``, ``p =
    sigmoid(gamma margin)``

    Values (N,). gamma must be given: it carries the units of the scores. centre as in ``bradley_terry``. The
    released trainer multiplies (B, 1) logits with (B,) targets, which averages over all pairs of rows; here
    each row has its own target.
    """
    target = margin_target(batch, gamma, "bradley_terry_mmpo")
    return _pairwise(reward, soft_logistic(_difference(reward), target), centre)


@method("bradley_terry_soft", arxiv="2410.03145", needs={P_CHOSEN}, traits={PAIRS, SCALAR_HEAD, MARGINS})
def bradley_terry_soft(reward: RewardPairs, batch: PairBatch, *, centre: float = 0.0) -> ExampleLoss:
    """``bradley_terry_mmpo`` with the data's own probability p_chosen as target, arXiv:2410.03145.

    Formula: ``-p ln sigmoid(x) - (1 - p) ln sigmoid(-x) + centre (r_w + r_l)^2``, ``x = r_w - r_l``, ``p =
    p_chosen``

    Values (N,). centre as in ``bradley_terry``.
    """
    target = stated_target(batch, "bradley_terry_soft")
    return _pairwise(reward, soft_logistic(_difference(reward), target), centre)


@method("orm", arxiv="2110.14168", needs={LABEL}, traits={LABELS, SCALAR_HEAD})
def orm(reward: Tensor, batch: LabelBatch) -> ExampleLoss:
    """Outcome reward model: cross-entropy of the label under the head's reward, as in arXiv:2110.14168.

    Formula: ``-y ln sigmoid(r) - (1 - y) ln sigmoid(-r)``, y the label

    Values (N,).
    """
    if reward.dim() != 1:
        raise ValueError(
            f"orm: the head's reward has shape {tuple(reward.shape)}, expected (N,); squeeze it first"
        )
    label = labels(batch, "orm").to(reward.dtype)
    with torch.no_grad():
        metrics = {"reward": reward.detach(), "accuracy": ((reward > 0) == (label > 0.5)).to(reward.dtype)}
    return ExampleLoss(soft_logistic(reward, label), metrics)


def _difference(reward: RewardPairs) -> Tensor:
    if reward.chosen.dim() != 1 or reward.rejected.shape != reward.chosen.shape:
        shapes = f"{tuple(reward.chosen.shape)} and {tuple(reward.rejected.shape)}"
        raise ValueError(f"the heads' rewards have shapes {shapes}, expected (N,) both; squeeze them first")
    return reward.chosen - reward.rejected


def _pairwise(reward: RewardPairs, values: Tensor, centre: float) -> ExampleLoss:
    centred = values + centre * (reward.chosen + reward.rejected).square() if centre else values
    return ExampleLoss(centred, reward_metrics(reward.chosen, reward.rejected))
