"""Functions shared by the losses with an importance ratio."""

from __future__ import annotations

from torch import Tensor

from rltrain.tensor_ops import apply_mask, masked_mean
from rltrain.types.policy import PolicyTokens, TrainBatch

# verl's clamp before exp: e^20 is far beyond every clip range and still finite when squared in float32
LOG_RATIO_LIMIT = 20.0


def log_ratio(policy: PolicyTokens, batch: TrainBatch) -> Tensor:
    """(B, T) ln(pi / pi_old), with gradient; 0 where masked out, whatever the values are there.

    The objective sets ``old_logp`` for an on-policy update; without it this raises ValueError.
    """
    if batch.old_logp is None:
        raise ValueError(
            "this policy loss takes a ratio to old_logp, which the batch lacks; pass policy.logp.detach() if "
            "on-policy"
        )
    return apply_mask(policy.logp - batch.old_logp, batch.mask)


def sequence_advantage(batch: TrainBatch) -> Tensor:
    """(B, 1) mean advantage over the sequence; in the papers the advantage is one number per completion."""
    return masked_mean(batch.advantages, batch.mask, dim=1)[:, None]


def approx_kl(log_ratios: Tensor) -> Tensor:
    """(B, T) nats, >= 0, detached: k3 estimate of KL(pi_old || pi) on the sampled tokens."""
    bounded = log_ratios.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded.exp() - bounded - 1


def policy_statistic(batch: TrainBatch, name: str, control: str) -> Tensor:
    """(B, T) the tensor ``extra[name]`` that the control ``control`` passes to its loss.

    Raises ValueError if that control did not run.
    """
    if name not in batch.extra:
        raise ValueError(
            f"this policy loss reads {name}, which control {control} computes; add {control} to the recipe's "
            "control"
        )
    return batch.extra[name]
