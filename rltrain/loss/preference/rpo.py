"""RPO: DPO with an imitation term, in the three forms that are known under this name."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics, per_token
from rltrain.loss.preference.statistics import statistic
from rltrain.needs import MEAN_CHOSEN_LENGTH, PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["rpo"]


@method("rpo", arxiv="2405.16436", needs={REF_LOGP, MEAN_CHOSEN_LENGTH}, traits={PAIRS})
def rpo(
    policy: PolicyPairs,
    batch: PairBatch,
    *,
    beta: float = 0.01,
    sft_weight: float = 0.005,
    sft_term: Literal["sum_times_beta", "sequence_mean", "token_mean"] = "sum_times_beta",
) -> ExampleLoss:
    """DPO plus the negative log-likelihood of the chosen answer, arXiv:2405.16436. Values (N,). beta as in
    ``dpo``.

    Formula: ``-ln sigmoid(z) - sft_weight beta ln pi(w)``; for other values of sft_term ``ln pi(w) / |w|`` or
    ``ln pi(w) / mean |w|`` takes the place of ``beta ln pi(w)``

    sft_term: the form of the negative log-likelihood that sft_weight multiplies; the forms differ by orders
    of magnitude. "sum_times_beta" is ``-beta log pi(y_w)``, summed over tokens, as in the paper and the
    authors' handbook code (weight 0.005). "sequence_mean" is each answer's mean over its tokens, as in the
    authors' OpenRLHF code (weight 0.2, beta 0.5). "token_mean" is one mean over all chosen tokens of the
    optimizer batch, as TRL's ["sigmoid", "sft"]; with weight 1 that is Iterative RPO (arXiv:2404.19733),
    another paper.
    """
    chosen, rejected = log_ratios(policy, batch)
    imitation = _imitation(policy, batch, beta, sft_term)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"sft": imitation.detach()}
    return ExampleLoss(-logsigmoid(beta * (chosen - rejected)) + sft_weight * imitation, metrics)


def _imitation(policy: PolicyPairs, batch: PairBatch, beta: float, sft_term: str) -> Tensor:
    nll = -policy.chosen.logp
    if sft_term == "sum_times_beta":
        return beta * nll
    if sft_term == "sequence_mean":
        return per_token(nll, batch.chosen)
    return nll / statistic(batch, "mean_chosen_length", "rpo").to(nll.dtype)
