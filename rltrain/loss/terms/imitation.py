"""The likelihood of what the policy did right, as a term beside its policy loss."""

from __future__ import annotations

from typing import Literal

import torch

from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["rewarded_nll"]


@method("rewarded_nll", arxiv="2504.05118")
def rewarded_nll(
    policy: PolicyTokens, batch: TrainBatch, *, rows: Literal["rewarded", "positive"] = "rewarded"
) -> TokenLoss:
    """Negative log-likelihood of the completions that were rewarded, arXiv:2504.05118 (VAPO's positive
    example loss). Values (B, T).

    Formula: ``-1[R > 0] ln pi``

    rows: those with a reward above 0, or those with an advantage above 0. The aggregate divides by all tokens
    or completions of the update and not by the rewarded ones, so that an update with few of them pulls less
    (CE-GPPO's code takes the mean over the rewarded ones).
    """
    chosen = batch.rewards[:, None] > 0 if rows == "rewarded" else batch.advantages > 0
    values = -apply_mask(policy.logp, batch.mask)
    return TokenLoss(torch.where(chosen & batch.mask, values, 0.0))
