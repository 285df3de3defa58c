"""Tokens whose log-prob and advantage vary together most: Clip-Cov drops some of them, KL-Cov anchors them,
arXiv:2505.22617.

    c_t = (logp_now - mean logp_now) (A - mean A)

over all tokens of the optimizer batch, all ranks, in float64 and summed in the order of size: neither
micro-batches nor the order of rows can change a covariance, a rank or a choice. (The authors' code takes
means, ranks and counts per micro-batch, and so hits at least one token in each.) Nothing here carries a
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import masked
from rltrain.types.policy import TrainBatch

__all__ = ["clip_cov", "kl_cov", "token_covariance"]


@method(
    "clip_cov",
    arxiv="2505.22617",
    needs={"old_logp", "logp_now"},
    traits={
        "policy_loss:clip",
        "same_as_policy_loss:eps_low",
        "same_as_policy_loss:eps_high",
        "fraction:ratio",
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
    """Clip-Cov: ``max(floor(ratio N), 1)`` of the N tokens lose value and gradient, chosen among ``low < c_t
    < high``, arXiv:2505.22617.

    A token that the policy loss clips already (A > 0 and r > 1 + eps_high, or A < 0 and r < 1 - eps_low) is
    not among them, so eps_low and eps_high are those of the loss ``clip``; the authors' scripts take 1 and 1.
    The choice is uniform, drawn from ``seed`` and the token's name (version and id of its row, position), and
    takes all where there are fewer. Chosen tokens get weight 0 and stay in the denominator. Values of ratio,
    low and high are the paper's.
    """
    now, old = _field(batch, "clip_cov", "logp_now"), _field(batch, "clip_cov", "old_logp")
    r, advantages = masked(now - old, batch.mask).exp(), masked(batch.advantages, batch.mask)
    clipped = -advantages * r.clamp(1 - eps_low, 1 + eps_high) > -advantages * r
    covariance = token_covariance(now, batch.advantages, batch.mask)
    eligible = batch.mask & ~clipped & (covariance > low) & (covariance < high)
    count = max(int(ratio * int(batch.mask.sum())), 1)
    chosen = _first(eligible, count, _lots(batch, seed))
    found = batch.replace(weights=torch.where(chosen, torch.zeros_like(batch.weights), batch.weights))
    return found.with_metrics(clip_cov_eligible=int(eligible.sum()) / max(int(batch.mask.sum()), 1))


@method(
    "kl_cov",
    arxiv="2505.22617",
    needs={"logp_now"},
    traits={"policy_loss:kl_cov", "off_policy_only", "fraction:ratio"},
)
def kl_cov(batch: TrainBatch, *, ratio: float = 2e-3, seed: int = 0) -> TrainBatch:
    """KL-Cov: marks the ``max(1, floor(ratio N))`` of the N tokens with the largest c_t for the loss
    ``kl_cov``, arXiv:2505.22617.

    The marks, 1 or 0, stand in ``extra["kl_cov"]``. ratio is a fraction: the paper's 2e-3 for 7B models (2e-4
    for 32B), which its code writes as 0.2 percent; 0 marks none. Equal covariances are drawn by lot, from
    ``seed`` and the token's name as in ``clip_cov``.
    """
    covariance = token_covariance(_field(batch, "kl_cov", "logp_now"), batch.advantages, batch.mask)
    count = max(int(ratio * int(batch.mask.sum())), 1) if ratio > 0 else 0
    chosen = _first(batch.mask, count, _lots(batch, seed), covariance)
    least = float(covariance[chosen].min()) if bool(chosen.any()) else 0.0
    return batch.with_extra(kl_cov=chosen.to(batch.weights.dtype)).with_metrics(kl_cov_least_covariance=least)


def token_covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) float64 c_t over the masked-in tokens, 0 elsewhere; its mean is their covariance."""
    return masked(_centred(logp, mask) * _centred(advantages, mask), mask)


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    values = values.detach().double()
    return values - values[mask].sort().values.sum() / mask.sum().clamp(min=1)


def _first(among: Tensor, count: int, lots: Tensor, value: Tensor | None = None) -> Tensor:
    """(B, T) bool: ``count`` of the tokens ``among``, those of the largest ``value``, and of the
    smallest lot where that is equal.
    """
    at = torch.nonzero(among.flatten()).flatten()
    at = at[lots.flatten()[at].sort().indices]
    if value is not None:
        at = at[value.flatten()[at].sort(descending=True, stable=True).indices]
    chosen = torch.zeros_like(among.flatten())
    chosen[at[:count]] = True
    return chosen.view(among.shape)


def _lots(batch: TrainBatch, seed: int) -> Tensor:
    """(B, T) int64: a number for every token that depends on its name only, not on where its row
    stands or how wide the batch is.
    """
    sample = _occurrence(batch.group) if batch.sample is None else batch.sample
    names = zip(batch.version.tolist(), batch.group.tolist(), sample.tolist(), strict=True)
    rows = torch.tensor(
        [stable_hash(seed, *name) for name in names], dtype=torch.int64, device=batch.mask.device
    )
    positions = torch.arange(batch.mask.shape[1], dtype=torch.int64, device=batch.mask.device)
    return _scrambled(_scrambled(rows)[:, None] + positions)


def _occurrence(group: Tensor) -> Tensor:
    """(B,) how many rows of the same group stand above each row: names rows that came without ids."""
    order = group.sort(stable=True).indices
    ordered = group[order]
    start = torch.searchsorted(ordered, ordered)
    return torch.empty_like(group).scatter_(0, order, torch.arange(len(group), device=group.device) - start)


def _scrambled(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads neighbours (the finaliser of SplitMix64, Steele et al. 2014);
    products wrap around.
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """``x >> by`` with zeros moving in, which int64 tensors do not have."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _field(batch: TrainBatch, control: str, name: str) -> Tensor:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"control {control} needs {name}, which the batch lacks")
    return value.detach()
