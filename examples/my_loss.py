"""A policy loss of one's own, named in a recipe as

loss: {policy: {name: 'my_loss.py:soft_clip', eps: 0.3}}
"""

from __future__ import annotations

import torch

from rltrain import PolicyTokens, TokenLoss, TrainBatch, method
from rltrain.loss.policy.ratio import log_ratio


@method("soft_clip", needs={"old_logp"}, traits={"owns_clipping"})
def soft_clip(policy: PolicyTokens, batch: TrainBatch, *, eps: float = 0.2) -> TokenLoss:
    """The policy gradient with the ratio squashed smoothly into 1 - eps to 1 + eps. Values (B, T)."""
    gain = eps * torch.tanh((log_ratio(policy, batch).exp() - 1) / eps)
    return TokenLoss(-batch.advantages * gain * batch.mask, {"gain": gain.detach().abs()})
