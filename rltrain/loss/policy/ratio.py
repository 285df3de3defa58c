"""What the importance-ratio losses share."""

from __future__ import annotations

from torch import Tensor

from rltrain.tensor_ops import masked, masked_mean
from rltrain.types.policy import PolicyTokens, TrainBatch

# verl's clamp before exp: e^20 is far beyond every clip range and still finite when squared in float32
LOG_RATIO_LIMIT = 20.0


def log_ratio(policy: PolicyTokens, batch: TrainBatch) -> Tensor:
    """(B, T) ln(pi / pi_old), with gradient; 0 where the mask is off, whatever stands there.

    The objective fills ``old_logp`` for an on-policy update; a loss called without it raises ValueError.
    """
    if batch.old_logp is None:
        raise ValueError(
            "this policy loss takes a ratio to old_logp, which the batch lacks; pass policy.logp.detach() if "
            "on-policy"
        )
    return masked(policy.logp - batch.old_logp, batch.mask)


def sequence_advantage(batch: TrainBatch) -> Tensor:
    """(B, 1) mean advantage of the sequence: its advantage, where that is one number per completion
    as the papers have it.
    """
    return masked_mean(batch.advantages, batch.mask, dim=1)[:, None]


def approx_kl(log_ratios: Tensor) -> Tensor:
    """(B, T) nats, >= 0, detached: k3 estimate of KL(pi_old || pi) on the sampled tokens."""
    bounded = log_ratios.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded.exp() - bounded - 1


def policy_statistic(batch: TrainBatch, name: str, control: str) -> Tensor:
    """(B, T) what the control called ``control`` hands to its loss as ``extra[name]``.

    Raises ValueError where it did not run.
    """
    if name not in batch.extra:
        raise ValueError(
            f"this policy loss reads {name}, which control {control} computes; add {control} to the recipe's "
            "control"
        )
    return batch.extra[name]
