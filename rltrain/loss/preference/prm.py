"""Objectives that turn outcome labels into an implicit process reward model, ``r(y) = beta log[pi(y|x) /
pi_ref(y|x)]``.

The pairwise objective is ``dpo`` on all pairs of a right and a wrong answer of a prompt, the Kahneman-Tversky
objective is ``kto``; both with beta 0.05.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.dpo import soft_logistic
from rltrain.loss.preference.ratio import completion_log_ratio, log_ratios, pair_metrics
from rltrain.loss.preference.statistics import labels, statistic
from rltrain.needs import GROUP_SIZE, LABEL, LABELS, PAIRS, REF_LOGP, REWARD_SOFTMAX, WHOLE_GROUPS
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PairBatch, PolicyPairs, PolicySequences

__all__ = ["implicit_prm_ce", "nca", "nca_group"]


@method("implicit_prm_ce", arxiv="2412.01981", needs={REF_LOGP, LABEL}, traits={LABELS})
def implicit_prm_ce(policy: PolicySequences, batch: LabelBatch, *, beta: float = 0.05) -> ExampleLoss:
    """Cross-entropy of the outcome label under the implicit reward, arXiv:2412.01981. Values (N,).

    Formula: ``-y ln sigmoid(beta u) - (1 - y) ln sigmoid(-beta u)``, y the label

    u is the sum over tokens of the log-ratio, beta the reward's scale. It works with one answer per prompt
    and with any share of right answers; a label between 0 and 1 is a soft target. PRIME updates its reward
    model with it (arXiv:2502.01456).
    """
    label = labels(batch, "implicit_prm_ce")
    logit = beta * completion_log_ratio(policy, batch.completion)
    return ExampleLoss(soft_logistic(logit, label.to(logit.dtype)), _outcome_metrics(logit, label))


@method("nca", arxiv="2402.05369", needs={REF_LOGP}, traits={PAIRS})
def nca(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.05) -> ExampleLoss:
    """NCA for pairs: the better answer against both, arXiv:2402.05369. Values (N,).

    Formula: ``-ln sigmoid(beta u_w) - 1/2 ln sigmoid(-beta u_w) - 1/2 ln sigmoid(-beta u_l)``

    beta: scale of the implicit reward. Unlike DPO, NCA fixes the zero of the reward, so that the chosen
    answer's likelihood does not fall along with the rejected one's.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, batch))
    values = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return ExampleLoss(values, pair_metrics(policy, chosen, rejected))


@method(
    "nca_group",
    arxiv="2402.05369",
    needs={REF_LOGP, LABEL, REWARD_SOFTMAX, GROUP_SIZE},
    traits={LABELS, WHOLE_GROUPS},
)
def nca_group(
    policy: PolicySequences, batch: LabelBatch, *, beta: float = 0.05, temperature: float = 0.5
) -> ExampleLoss:
    """NCA for K answers with explicit rewards, arXiv:2402.05369. Values (N,).

    Formula: ``-K p ln sigmoid(beta u) - ln sigmoid(-beta u)``, ``p = softmax(reward / temperature)`` over the
    prompt's K answers

    The K answers are those in the optimizer batch. Averaged over the answers of one prompt this is ``-sum_i
    [p_i ln sigmoid(beta u_i) + ln sigmoid(-beta u_i) / K]``; prompts are weighted by their number of answers.
    """
    weight = statistic(batch, "reward_softmax", "nca_group")
    logit = beta * completion_log_ratio(policy, batch.completion)
    share = weight.to(logit.dtype) * statistic(batch, "group_size", "nca_group").to(logit.dtype)
    return ExampleLoss(
        -share * logsigmoid(logit) - logsigmoid(-logit), _outcome_metrics(logit, labels(batch, "nca_group"))
    )


def _outcome_metrics(logit: Tensor, label: Tensor) -> dict[str, Tensor]:
    """(N,) detached: the reward, and whether its sign agrees with the label."""
    with torch.no_grad():
        return {"reward": logit.detach(), "accuracy": ((logit > 0) == (label > 0.5)).to(logit.dtype)}
