"""Entropy terms beyond the plain bonus: over a clamped vocabulary, and with a penalty relative to earlier
entropies.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import CLAMPED_ENTROPY, ENTROPY_GRAD
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["clamped_entropy", "epo"]


@method("clamped_entropy", arxiv="2509.03493", needs={CLAMPED_ENTROPY("{share}")})
def clamped_entropy(policy: PolicyTokens, batch: TrainBatch, *, share: float = 0.3) -> TokenLoss:
    """AEnt's bonus: minus the entropy of the policy over its likelier tokens, arXiv:2509.03493. Values (B,
    T), nats.

    The ``floor(share V)`` least likely tokens are left out and the rest is renormalised; the choice carries
    no gradient. share 0 is the ordinary entropy bonus. The metric ``nats`` is the clamped entropy, which the
    coefficient ``entropy_band`` observes.
    """
    name = f"clamped_entropy:{share}"
    if name not in policy.extra:
        raise ValueError(f"the clamped_entropy term needs the statistic {name!r}, which was not computed")
    values = apply_mask(policy.extra[name], batch.mask)
    return TokenLoss(-values, {"nats": values.detach()})


@method("epo", arxiv="2509.22576", needs={ENTROPY_GRAD})
def epo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    history: Tensor | None = None,
    smoothing: Tensor | None = None,
    alpha: float = 0.1,
    kappa_low: float = 0.0,
    kappa_high: float = 2.0,
    penalty: Literal["hinge", "constant"] = "hinge",
) -> TokenLoss:
    """Entropy bonus minus a penalty for leaving the range of earlier entropies, arXiv:2509.22576. Values (B,
    T), nats.

    ``-(H - smoothing alpha P)`` with ``P = max(0, kappa_low h - H) + max(0, H - kappa_high h)``, where h is
    ``history``, the mean entropy of the earlier steps; without a history there is no penalty. history and
    smoothing come from the coefficient ``epo_schedule``. alpha is 0.1 for ALFWorld and 0.05 for ScienceWorld.
    penalty "constant" is the released code's: alpha outside the open range, which has no gradient and so
    changes only the reported loss.
    """
    if policy.entropy is None:
        raise ValueError("the epo term needs policy.entropy, which was not computed")
    entropy = apply_mask(policy.entropy, batch.mask)
    if history is None or smoothing is None:
        return TokenLoss(-entropy)
    low = kappa_low * history
    high = kappa_high * history
    if penalty == "hinge":
        excess = alpha * ((low - entropy).clamp(min=0) + (entropy - high).clamp(min=0))
    else:
        excess = torch.where((entropy > low) & (entropy < high), 0.0, alpha)
    excess = apply_mask(excess, batch.mask)
    is_outside = apply_mask(((entropy <= low) | (entropy >= high)).to(entropy.dtype), batch.mask)
    metrics = {"penalty": excess.detach(), "outside": is_outside.detach()}
    return TokenLoss(smoothing * excess - entropy, metrics)
