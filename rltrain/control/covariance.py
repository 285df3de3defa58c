"""Tokens with the largest covariance of log-prob and advantage: Clip-Cov drops some of them, KL-Cov penalises
their change, arXiv:2505.22617.

    c_t = (logp_now - mean logp_now) (A - mean A)

over all tokens of the optimizer batch, all ranks, in float64 and summed in the order of size: neither
micro-batches nor the order of rows can change a covariance, a rank or a choice. (The authors' code takes
means, ranks and counts per micro-batch, and so selects at least one token in each.) Nothing here carries a
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.needs import FRACTION, LOGP_NOW, OFF_POLICY_ONLY, OLD_LOGP, POLICY_LOSS, SAME_AS_POLICY_LOSS
from rltrain.registry import method
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import TrainBatch

__all__ = ["clip_cov", "kl_cov", "token_covariance"]


@method(
    "clip_cov",
    arxiv="2505.22617",
    needs={OLD_LOGP, LOGP_NOW},
    traits={
        POLICY_LOSS("clip"),
        SAME_AS_POLICY_LOSS("eps_low"),
        SAME_AS_POLICY_LOSS("eps_high"),
        FRACTION("ratio"),
    },
)
def clip_cov(
    batch: TrainBatch,
    *,
    ratio: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    eps_low: float = 1.0,
    eps_high: float = 1.0,
    seed: int = 0,
) -> TrainBatch:
    """Clip-Cov: a few of the tokens whose log-prob and advantage covary lose value and gradient,
    arXiv:2505.22617.

    Formula: weight 0 for ``max(floor(ratio N), 1)`` of the N tokens, drawn among ``low < c < high``; ``c =
    (ln pi - mean ln pi) (A - mean A)``

    Tokens that the policy loss already clips (A > 0 and r > 1 + eps_high, or A < 0 and r < 1 - eps_low) are
    not eligible, so eps_low and eps_high must be those of the loss ``clip``; the authors' scripts use 1 and
    1. The choice is uniform, drawn from ``seed`` and the token's identity (version and id of its row,
    position); if fewer tokens are eligible all are chosen. Chosen tokens get weight 0 and stay in the
    denominator. The defaults of ratio, low and high are the paper's.
    """
    now = _require_field(batch, "clip_cov", "logp_now")
    old = _require_field(batch, "clip_cov", "old_logp")
    r = apply_mask(now - old, batch.mask).exp()
    advantages = apply_mask(batch.advantages, batch.mask)
    clipped = -advantages * r.clamp(1 - eps_low, 1 + eps_high) > -advantages * r
    covariance = token_covariance(now, batch.advantages, batch.mask)
    eligible = batch.mask & ~clipped & (covariance > low) & (covariance < high)
    count = max(int(ratio * int(batch.mask.sum())), 1)
    chosen = _select_tokens(eligible, count, _token_keys(batch, seed))
    weights = torch.where(chosen, torch.zeros_like(batch.weights), batch.weights)
    eligible_share = int(eligible.sum()) / max(int(batch.mask.sum()), 1)
    return batch.replace(weights=weights).with_metrics(clip_cov_eligible=eligible_share)


@method(
    "kl_cov",
    arxiv="2505.22617",
    needs={LOGP_NOW},
    traits={POLICY_LOSS("kl_cov"), OFF_POLICY_ONLY, FRACTION("ratio")},
)
def kl_cov(batch: TrainBatch, *, ratio: float = 2e-3, seed: int = 0) -> TrainBatch:
    """KL-Cov: marks the tokens whose log-prob and advantage covary most, for the loss ``kl_cov``,
    arXiv:2505.22617.

    Formula: mark ``1[c is among the max(floor(ratio N), 1) largest]``, ``c = (ln pi - mean ln pi) (A - mean
    A)``

    The marks, 1 or 0, are put in ``extra["kl_cov"]``. ratio is a fraction: the paper's 2e-3 for 7B models
    (2e-4 for 32B), which its code writes as 0.2 percent; 0 marks none. Ties between equal covariances are
    broken at random, from ``seed`` and the token's identity as in ``clip_cov``.
    """
    covariance = token_covariance(_require_field(batch, "kl_cov", "logp_now"), batch.advantages, batch.mask)
    count = max(int(ratio * int(batch.mask.sum())), 1) if ratio > 0 else 0
    chosen = _select_tokens(batch.mask, count, _token_keys(batch, seed), covariance)
    least = float(covariance[chosen].min()) if bool(chosen.any()) else 0.0
    return batch.with_extra(kl_cov=chosen.to(batch.weights.dtype)).with_metrics(kl_cov_least_covariance=least)


def token_covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) float64 c_t over the masked-in tokens, 0 elsewhere; its mean is their covariance."""
    return apply_mask(_deviations(logp, mask) * _deviations(advantages, mask), mask)


def _deviations(values: Tensor, mask: Tensor) -> Tensor:
    values = values.detach().double()
    return values - values[mask].sort().values.sum() / mask.sum().clamp(min=1)


def _select_tokens(eligible: Tensor, count: int, keys: Tensor, value: Tensor | None = None) -> Tensor:
    """(B, T) bool: the ``count`` eligible tokens with the largest ``value``; ties go to the smallest key."""
    tokens = torch.nonzero(eligible.flatten()).flatten()
    tokens = tokens[keys.flatten()[tokens].sort().indices]
    if value is not None:
        tokens = tokens[value.flatten()[tokens].sort(descending=True, stable=True).indices]
    chosen = torch.zeros_like(eligible.flatten())
    chosen[tokens[:count]] = True
    return chosen.view(eligible.shape)


def _token_keys(batch: TrainBatch, seed: int) -> Tensor:
    """(B, T) int64: a random key for every token that depends only on the token's identity, not on the
    position of its row or the width of the batch.
    """
    sample = _occurrence_index(batch.group) if batch.sample is None else batch.sample
    ids = zip(batch.oldest.tolist(), batch.group.tolist(), sample.tolist(), strict=True)
    hashes = [stable_hash(seed, *row_id) for row_id in ids]
    rows = torch.tensor(hashes, dtype=torch.int64, device=batch.mask.device)
    positions = torch.arange(batch.mask.shape[1], dtype=torch.int64, device=batch.mask.device)
    return _scramble_bits(_scramble_bits(rows)[:, None] + positions)


def _occurrence_index(group: Tensor) -> Tensor:
    """(B,) number of earlier rows of the same group: the id of a row in a batch without sample ids."""
    order = group.sort(stable=True).indices
    ordered = group[order]
    start = torch.searchsorted(ordered, ordered)
    return torch.empty_like(group).scatter_(0, order, torch.arange(len(group), device=group.device) - start)


def _scramble_bits(x: Tensor) -> Tensor:
    """A bijection of int64 that sends neighbours far apart (the finaliser of SplitMix64, Steele et al. 2014).

    Products wrap around.
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` that fills with zeros, which int64 tensors lack."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _require_field(batch: TrainBatch, control: str, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"control {control} needs {name}, which the batch lacks")
    return value.detach()
