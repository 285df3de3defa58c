"""H-DPO: separates how sharp the optimum is from how far it may leave the reference."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import pair_metrics, ref_logp
from rltrain.needs import PAIRS, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = ["h_dpo"]


@method("h_dpo", arxiv="2411.07595", needs={REF_LOGP}, traits={PAIRS})
def h_dpo(policy: PolicyPairs, batch: PairBatch, *, alpha: float = 1.0, beta: float = 0.1) -> ExampleLoss:
    """DPO with ``alpha`` on the policy's log-probs only, arXiv:2411.07595. Values (N,).

    Formula: ``-ln sigmoid(alpha beta [ln pi(w) - ln pi(l)] - beta [ln pi_ref(w) - ln pi_ref(l)])``

    The KL penalty's entropy part is multiplied by alpha > 0, below 1 for a sharper optimum ``pi_ref^(1/alpha)
    exp(r / (alpha beta))``; 1 is DPO. beta as in ``dpo``. If the policy equals its reference the loss is not
    ln 2 unless alpha is 1, and the logged reward is ``alpha beta log pi - beta log pi_ref``. The paper argues
    for alpha slightly below 1; its value is not the default here.
    """
    if not alpha > 0:
        raise ValueError(
            f"h_dpo: alpha is {alpha}, expected above 0: without the entropy part the optimum is a single "
            "answer"
        )
    chosen = alpha * policy.chosen.logp - ref_logp(batch.chosen)
    rejected = alpha * policy.rejected.logp - ref_logp(batch.rejected)
    return ExampleLoss(
        -logsigmoid(beta * (chosen - rejected)), pair_metrics(policy, beta * chosen, beta * rejected)
    )
