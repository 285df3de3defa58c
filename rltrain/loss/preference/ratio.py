"""Log-ratios to the frozen models, and the metrics that every pairwise loss logs."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.types.preference import CompletionFacts, PairBatch, PolicyPairs, PolicySequences

__all__ = ["completion_log_ratio", "count_wins", "log_ratios", "pair_metrics", "per_token", "reward_metrics"]

_TIE = 1e-6  # a margin up to this is what rounding leaves between a policy and the reference that it equals


def completion_log_ratio(policy: PolicySequences, facts: CompletionFacts) -> Tensor:
    """(N,) nats: log pi(y|x) - log pi_ref(y|x), sums over the scored tokens."""
    return policy.logp - ref_logp(facts)


def log_ratios(policy: PolicyPairs, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(N,) each: the log-ratios of chosen and rejected."""
    chosen = completion_log_ratio(policy.chosen, batch.chosen)
    rejected = completion_log_ratio(policy.rejected, batch.rejected)
    return chosen, rejected


def ref_logp(facts: CompletionFacts) -> Tensor:
    """(N,) the reference's log-probs, detached. Raises ValueError if they were not computed."""
    if facts.ref_logp is None:
        raise ValueError("the loss compares with a reference model, but ref_logp was not computed")
    return facts.ref_logp.detach()


def per_token(sums: Tensor, facts: CompletionFacts) -> Tensor:
    """(N,) sums over tokens divided by the number of scored tokens.

    Lengths come from the mask, not from counting non-zero log-ratios.
    """
    return sums / facts.length.clamp(min=1).to(sums.dtype)


def pair_metrics(policy: PolicyPairs, chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """(N,) each, detached: implicit rewards, their margin, accuracy (a tie is half right), and both
    log-probs.

    Both log-probs may fall while the margin grows, which the margin alone does not show.
    """
    logps = {"logp_chosen": policy.chosen.logp.detach(), "logp_rejected": policy.rejected.logp.detach()}
    return reward_metrics(chosen_reward, rejected_reward) | logps


def reward_metrics(chosen_reward: Tensor, rejected_reward: Tensor) -> dict[str, Tensor]:
    """(N,) each, detached: rewards, their margin, and accuracy as ``count_wins``."""
    with torch.no_grad():
        margin = chosen_reward - rejected_reward
        return {
            "reward_chosen": chosen_reward.detach(),
            "reward_rejected": rejected_reward.detach(),
            "margin": margin,
            "accuracy": count_wins(margin),
        }


def count_wins(margin: Tensor) -> Tensor:
    """In the shape of ``margin``: 1 above 0, and one half at a tie, because a policy equal to its reference
    prefers neither side.
    """
    return torch.where(margin.abs() <= _TIE, 0.5, (margin > 0).to(margin.dtype))
