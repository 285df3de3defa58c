"""COPO's loss: the clipped surrogate of a completion's own advantage plus that of its prompt's."""

from __future__ import annotations

from rltrain.loss.policy.clip import clip
from rltrain.loss.policy.ratio import policy_statistic
from rltrain.needs import ACTS_ON_MARKS, CONTROL, OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["copo"]


@method("copo", arxiv="2508.04138", needs={OLD_LOGP}, traits={OWNS_CLIPPING, CONTROL("copo"), ACTS_ON_MARKS})
def copo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> TokenLoss:
    """COPO: the surrogate of a completion's own advantage plus that of its prompt's, arXiv:2508.04138. Values
    (B, T).

    Formula: ``clip(w A_local) + clip((1 - w) A_global) = w clip(A_local) + (1 - w) clip(A_global)``, clip(A)
    the loss ``clip`` of A

    The control ``copo`` weights both advantages, because the surrogate is positively homogeneous in the
    advantage. eps_low, eps_high and dual_clip as in ``clip``, for both; dual_clip 3 is the default of verl,
    on which the release is built.
    """
    settings = {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": dual_clip}
    local = clip(policy, batch, **settings)
    prompt_batch = batch.replace(advantages=policy_statistic(batch, "advantage_global", "copo"))
    prompt = clip(policy, prompt_batch, **settings)
    metrics = {f"global_{name}": value for name, value in prompt.metrics.items() if name != "approx_kl"}
    return TokenLoss(local.values + prompt.values, {**local.metrics, **metrics})
