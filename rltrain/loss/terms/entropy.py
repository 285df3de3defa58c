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

    Formula: ``-H(p)``, p the policy over all but the ``floor(share V)`` least likely tokens, renormalised

    The choice of tokens carries no gradient. share 0 is the ordinary entropy bonus. The metric ``nats`` is
    the clamped entropy, which the coefficient ``entropy_band`` observes.
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

    Formula: ``-(H - smoothing alpha P)``, ``P = max(0, kappa_low h - H) + max(0, H - kappa_high h)``

    h is ``history``, the mean entropy of the earlier steps: (), or (K,) for the turns of an episode, each
    token's being that of its turn; without a history there is no penalty. history and smoothing come from the
    coefficient ``epo_schedule``. alpha is 0.1 for ALFWorld and 0.05 for ScienceWorld. penalty "constant" is
    the released code's: alpha outside the open range, which has no gradient and so changes only the reported
    loss.
    """
    if policy.entropy is None:
        raise ValueError("the epo term needs policy.entropy, which was not computed")
    entropy = apply_mask(policy.entropy, batch.mask)
    if history is None or smoothing is None:
        return TokenLoss(-entropy)
    history, has_history = _history_of_tokens(history, batch)
    low = kappa_low * history
    high = kappa_high * history
    if penalty == "hinge":
        excess = alpha * ((low - entropy).clamp(min=0) + (entropy - high).clamp(min=0))
    else:
        excess = torch.where((entropy > low) & (entropy < high), 0.0, alpha)
    counts = batch.mask.bool() & has_history
    excess = apply_mask(excess, counts)
    is_outside = apply_mask(((entropy <= low) | (entropy >= high)).to(entropy.dtype), counts)
    metrics = {"penalty": excess.detach(), "outside": is_outside.detach()}
    return TokenLoss(smoothing * excess - entropy, metrics)


def _history_of_tokens(history: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """The history of each token, () or (B, T) nats, and whether it has one, in the same shape.

    A turn beyond the earlier episodes', or that none of them reached (NaN), has none. Raises ValueError where
    the history is one of turns and the batch has no turns.
    """
    if history.dim() == 0:
        return history, torch.ones_like(history, dtype=torch.bool)
    if batch.step_id is None:
        raise ValueError(
            "the epo term got a history for each turn, and no completion of the step has turns; set "
            "rollout.environment, or the coefficient's history to step"
        )
    turns = torch.cat([history, history.new_full((1,), torch.nan)])  # the last stands for all later turns
    values = turns[batch.step_id.clamp(0, len(history))]
    return values.nan_to_num(0.0), ~values.isnan()
