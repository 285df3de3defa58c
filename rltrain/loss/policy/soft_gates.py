"""Losses that weigh a token smoothly by its ratio, or by its sequence's, where PPO clips: SAPO and VESPO."""

from __future__ import annotations

import math

import torch

from rltrain.loss.policy.ratio import LOG_RATIO_LIMIT, approx_kl, log_ratio
from rltrain.needs import OLD_LOGP, OWNS_CLIPPING
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_sum
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["sapo", "vespo"]

_LEAST_LOG_WEIGHT = math.log(1e-8)  # of a sequence, as in the authors' code


@method("sapo", arxiv="2511.20347", needs={OLD_LOGP}, traits={OWNS_CLIPPING})
def sapo(
    policy: PolicyTokens, batch: TrainBatch, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> TokenLoss:
    """SAPO: a soft gate on the token's ratio, arXiv:2511.20347. Values (B, T).

    Formula: ``-A (4 / tau) sigmoid(tau (r - 1))``

    At r = 1 the gradient is the policy gradient's; it fades on both sides, the faster the larger tau.
    tau_positive and tau_negative: for tokens with A > 0 and the others; the paper takes the second larger,
    since an update of a rejected token spreads over the whole vocabulary. Use the aggregate
    ``seq_mean_token_mean``.
    """
    log_r = log_ratio(policy, batch)
    r = log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    tau = torch.where(batch.advantages > 0, tau_positive, tau_negative).to(r.dtype)
    values = -batch.advantages * torch.sigmoid(tau * (r - 1)) * 4 / tau
    return TokenLoss(apply_mask(values, batch.mask), {"approx_kl": approx_kl(log_r)})


@method("vespo", arxiv="2602.10693", needs={OLD_LOGP}, traits={OWNS_CLIPPING})
def vespo(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> TokenLoss:
    """VESPO: the policy gradient under a smooth weight of the whole sequence's ratio, arXiv:2602.10693.
    Values (B, T).

    Formula: ``-sg[phi(w)] A ln pi``, ``phi(w) = w^k e^(l (1 - w))``, ``w = prod_t r``

    w has no correction for length: phi is 1 at w = 1 and falls to 0 on both sides. power_positive and
    decay_positive: k and l for tokens with A >= 0; power_negative and decay_negative: those of the others;
    defaults are TRL's. A control that weighs by the engine's log-probs multiplies the loss; the release puts
    that ratio into w.
    """
    log_r = log_ratio(policy, batch).detach()
    log_w = masked_sum(log_r.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), batch.mask, dim=1)[:, None]
    log_w = log_w.clamp(_LEAST_LOG_WEIGHT, LOG_RATIO_LIMIT)
    is_positive = batch.advantages >= 0
    power = torch.where(is_positive, power_positive, power_negative).to(log_w.dtype)
    decay = torch.where(is_positive, decay_positive, decay_negative).to(log_w.dtype)
    phi = (decay + power * log_w - decay * log_w.exp()).exp()
    values = -phi * batch.advantages * apply_mask(policy.logp, batch.mask)
    metrics = {"approx_kl": approx_kl(log_r), "sequence_weight": phi}
    return TokenLoss(apply_mask(values, batch.mask), metrics)
