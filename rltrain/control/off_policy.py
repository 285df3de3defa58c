"""Corrections for completions that were sampled from the inference engine's distribution instead of the
learner's old policy.

rho_t = exp(old_logp - rollout_logp) is the learner's probability divided by the engine's. These controls
multiply ``weights``, which multiply the per-token policy loss outside any clipping; the loss's own ratio
keeps ``old_logp`` in its denominator. Nothing here carries a gradient, and statistics run over the whole
step. Weights of masked-out tokens are 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import LOGP_NOW, OLD_LOGP, ROLLOUT_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_mean, masked_sum
from rltrain.types.policy import TrainBatch

__all__ = ["divergence_rejection", "geometric_rejection", "mis", "off_policy_mask", "tis"]

LOG_RHO_LIMIT = 20.0  # verl's clamp before exp


@method("tis", needs={OLD_LOGP, ROLLOUT_LOGP})
def tis(
    batch: TrainBatch,
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
    floor: float = 0.0,
    normalize: Literal["none", "batch"] = "none",
) -> TrainBatch:
    """Truncated importance sampling (Ionides 2008; for inference engines: Yao et al. 2025): a bounded weight.

    Formula: weight ``clip(rho, floor, cap)``

    level: a token's own rho, or the product over its sequence. floor: smallest weight, for a truncation from
    both sides (verl's two thresholds drop what lies outside, as ``mis``). normalize "batch" divides the
    truncated weights by their mean over the step: over tokens, or at sequence level over sequences (each
    once, whatever its length), as verl does.
    """
    weights = _rho(batch, "tis", level).clamp(floor, cap)
    if normalize == "batch":
        counted = batch.mask if level == "token" else batch.mask.any(dim=1, keepdim=True)
        weights = weights / masked_mean(weights, counted)
    return _multiply_weights(batch, weights)


@method("mis", needs={OLD_LOGP, ROLLOUT_LOGP})
def mis(
    batch: TrainBatch,
    *,
    level: Literal["token", "sequence"] = "sequence",
    low: float = 0.0,
    high: float = 3.0,
    denominator: Literal["all", "kept"] = "all",
) -> TrainBatch:
    """Masked importance sampling (IcePop, Ling team 2025): tokens or sequences with an extreme weight get
    none. Defaults are TRL's.

    Formula: weight ``rho 1[low <= rho <= high]``

    level as in ``tis``. denominator: the loss is divided by all tokens and sequences ("all": the others get
    weight 0, as in TRL), or only by those kept ("kept": the others are masked out, as in verl's rejection,
    and so leave terms and metrics too).
    """
    rho = _rho(batch, "mis", level)
    return _restrict(_multiply_weights(batch, rho), (rho >= low) & (rho <= high), denominator)


@method("geometric_rejection", needs={OLD_LOGP, ROLLOUT_LOGP})
def geometric_rejection(
    batch: TrainBatch,
    *,
    low: float = 0.999,
    high: float = 1.001,
    denominator: Literal["all", "kept"] = "kept",
) -> TrainBatch:
    """Drops a sequence whose geometric mean of rho lies outside bounds; other weights do not change.

    Formula: kept: ``low <= exp(mean_t ln rho) <= high``

    The bounds are on rho. verl's release (``seq_mean_k1``) compares them with 1 / rho, which differs if they
    are not reciprocal. denominator as in ``mis``; verl masks the sequence out.
    """
    geometric = masked_mean(_log_rho(batch, "geometric_rejection"), batch.mask, dim=1)[:, None].exp()
    return _restrict(batch, (geometric >= low) & (geometric <= high), denominator)


@method("divergence_rejection", needs={OLD_LOGP, ROLLOUT_LOGP})
def divergence_rejection(
    batch: TrainBatch,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    over: Literal["token", "sequence_sum", "sequence_mean", "sequence_max"] = "sequence_mean",
    low: float | None = None,
    high: float = 0.01,
    denominator: Literal["all", "kept"] = "kept",
) -> TrainBatch:
    """Drops tokens or sequences whose estimated KL between engine and learner lies outside bounds; no weight
    changes (verl's rejection, without importance weights).

    Formula: kept: ``low <= K <= high``; with x = ln rho, k1: ``K = -x``, k2: ``K = x^2 / 2``, k3: ``K = e^x -
    1 - x``

    estimator: of the KL, in nats. over: a token's own number, or the sum, mean or largest of its sequence.
    low, high: bounds; low None is -high for k1, whose sign says which of the two is larger, and none for the
    others, which are at least 0. verl states k1's bounds as ratios: its "0.5_2" is low ln 0.5 and high ln 2.
    denominator as in ``mis``; verl masks out.
    """
    log_rho = _log_rho(batch, "divergence_rejection").clamp(-LOG_RHO_LIMIT, LOG_RHO_LIMIT)
    if estimator == "k1":
        values = -log_rho
    elif estimator == "k2":
        values = 0.5 * log_rho.square()
    else:
        values = log_rho.exp() - 1 - log_rho
    if over == "sequence_sum":
        values = masked_sum(values, batch.mask, dim=1)[:, None]
    elif over == "sequence_mean":
        values = masked_mean(values, batch.mask, dim=1)[:, None]
    elif over == "sequence_max":
        values = torch.where(batch.mask, values, -torch.inf).amax(dim=1, keepdim=True)
    if low is None:
        low = -high if estimator == "k1" else -math.inf
    return _restrict(batch, (values >= low) & (values <= high), denominator)


@method("off_policy_mask", arxiv="2512.02556", needs={ROLLOUT_LOGP, LOGP_NOW})
def off_policy_mask(
    batch: TrainBatch, *, delta: float = 0.5, denominator: Literal["all", "kept"] = "all"
) -> TrainBatch:
    """Drops negative examples that the policy has moved away from, by nats per token over the sequence,
    arXiv:2512.02556.

    Formula: kept: ``A >= 0`` or ``mean_t(ln pi_engine - ln pi) <= delta``

    The paper gives no delta; TRL disables the mask by default and suggests 0.5. Advantages are read per
    token, which is the paper's rule if a completion has one advantage. denominator as in ``mis``; TRL divides
    by all.
    """
    rollout = _require_field(batch, "off_policy_mask", "rollout_logp")
    now = _require_field(batch, "off_policy_mask", "logp_now")
    distance = masked_mean(rollout - now, batch.mask, dim=1)[:, None]
    return _restrict(batch, (batch.advantages >= 0) | (distance <= delta), denominator)


def _require_field(batch: TrainBatch, control: str, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"control {control} needs {name}, which the batch lacks")
    return value.detach()


def _log_rho(batch: TrainBatch, control: str) -> Tensor:
    old = _require_field(batch, control, "old_logp")
    rollout = _require_field(batch, control, "rollout_logp")
    return apply_mask(old - rollout, batch.mask)


def _rho(batch: TrainBatch, control: str, level: Literal["token", "sequence"]) -> Tensor:
    """(B, T) rho per token, or (B, 1) its product over the sequence; ln rho is clamped to +-20 first."""
    log_rho = _log_rho(batch, control)
    if level == "sequence":
        log_rho = masked_sum(log_rho, batch.mask, dim=1)[:, None]
    return log_rho.clamp(-LOG_RHO_LIMIT, LOG_RHO_LIMIT).exp()


def _multiply_weights(batch: TrainBatch, factor: Tensor) -> TrainBatch:
    return batch.replace(weights=apply_mask(batch.weights * factor, batch.mask))


def _restrict(batch: TrainBatch, keep: Tensor, denominator: Literal["all", "kept"]) -> TrainBatch:
    """``batch`` with weight 0 outside ``keep``; with denominator "kept" also masked out there."""
    keep = batch.mask & keep
    batch = batch.replace(weights=torch.where(keep, batch.weights, torch.zeros_like(batch.weights)))
    return batch.replace(mask=keep) if denominator == "kept" else batch
