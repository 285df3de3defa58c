"""CISPO: the importance weight is clipped and detached, so that every token keeps its gradient."""

from __future__ import annotations

from typing import Literal

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio
from rltrain.needs import OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["cispo"]


@method("cispo", arxiv="2506.13585", needs={OLD_LOGP}, traits={OWNS_CLIPPING})
def cispo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    convention: Literal["absolute", "relative"] = "absolute",
    cap: float = 5.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> TokenLoss:
    """CISPO: the policy gradient with a bounded ratio as weight, arXiv:2506.13585. Values (B, T).

    Formula: ``-sg[w] A ln pi``, ``w = min(r, cap)`` or ``clip(r, 1 - eps_low, 1 + eps_high)``

    convention: "absolute" is the cap with no lower bound, as in the paper's runs and TRL (ScaleRL's cap 5);
    "relative" bounds both sides by eps_low and eps_high, as in verl. Only the parameters of the chosen
    convention are read.
    """
    log_r = log_ratio(policy, batch).detach()
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = (0.0, cap) if convention == "absolute" else (1 - eps_low, 1 + eps_high)
    values = -r.clamp(low, high) * batch.advantages * apply_mask(policy.logp, batch.mask)
    metrics = {
        "approx_kl": approx_kl(log_r),
        "clip_high": (r > high).to(r.dtype),
        "clip_low": (r < low).to(r.dtype),
    }
    return TokenLoss(apply_mask(values, batch.mask), metrics)
