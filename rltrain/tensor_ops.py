"""Masked reductions and segment means over ``(B, T)`` tensors. Pure, differentiable where the input is."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``values`` where ``mask``; what stands elsewhere (NaN included) contributes nothing."""
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over ``mask``; 0 where nothing is masked in."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1).to(values.dtype)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile over ``mask``; 0 where nothing is masked in. Any size (torch.quantile stops at 16M)."""
    flat = values[mask.bool()].sort().values
    if flat.numel() == 0:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    position = q * (flat.numel() - 1)
    low = int(position)
    high = min(low + 1, flat.numel() - 1)
    return flat[low] + (flat[high] - flat[low]) * (position - low)


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """(B,) mean of ``values (B,)`` over the rows that share ``segment (B,)``, at every row."""
    total, count, inverse = _segment_sums(values, segment)
    return (total / count)[inverse]


def segment_count(segment: Tensor) -> Tensor:
    """(B,) int64 number of rows that share each row's ``segment (B,)``."""
    _, inverse, count = torch.unique(segment, return_inverse=True, return_counts=True)
    return count[inverse]


def segment_std(values: Tensor, segment: Tensor, ddof: int = 1) -> Tensor:
    """(B,) standard deviation of ``values (B,)`` within each ``segment (B,)``, at every row; 0 for one row with ddof 1."""
    centred = values - segment_mean(values, segment)
    total, count, inverse = _segment_sums(centred.square(), segment)
    return (total / (count - ddof).clamp(min=1)).sqrt()[inverse]


def _segment_sums(values: Tensor, segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, inverse, count = torch.unique(segment, return_inverse=True, return_counts=True)
    total = torch.zeros(count.shape[0], dtype=values.dtype, device=values.device).index_add(0, inverse, values)
    return total, count.to(values.dtype), inverse
