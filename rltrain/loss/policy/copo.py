"""COPO's loss: the clipped surrogate twice, on a completion's own advantage and on its prompt's."""

from __future__ import annotations

from rltrain.loss.policy.clip import clip
from rltrain.loss.policy.ratio import policy_statistic
from rltrain.registry import method
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["copo"]


@method(
    "copo", arxiv="2508.04138", needs={"old_logp"}, traits={"owns_clipping", "control:copo", "acts_on_marks"}
)
def copo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> TokenLoss:
    """COPO: ``clip(w A_local) + clip((1 - w) A_global)``, which is w l_local + (1 - w) l_global,
    arXiv:2508.04138. Values (B, T).

    Both advantages come weighted from the control ``copo``: the surrogate is positively homogeneous in the
    advantage. eps_low, eps_high and dual_clip as in ``clip``, for both; dual_clip 3 is verl's, on which the
    release is built.
    """
    settings = {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": dual_clip}
    local = clip(policy, batch, **settings)
    everywhere = clip(
        policy, batch.replace(advantages=policy_statistic(batch, "advantage_global", "copo")), **settings
    )
    shown = {f"global_{name}": value for name, value in everywhere.metrics.items() if name != "approx_kl"}
    return TokenLoss(local.values + everywhere.values, {**local.metrics, **shown})
