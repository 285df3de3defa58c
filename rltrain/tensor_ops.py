"""Masked reductions and segment means over ``(B, T)`` tensors: pure, and differentiable in their input."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rltrain.seeds import stable_hash


def apply_mask(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask``, 0 elsewhere.

    Masked-out values (NaN included) affect neither the result nor the gradient.
    """
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``values`` where ``mask``; masked-out values (NaN included) contribute nothing."""
    kept = apply_mask(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over ``mask``; 0 if nothing is masked in."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1).to(values.dtype)


def masked_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile over ``mask``; 0 if nothing is masked in.

    It takes any number of values (torch.quantile takes at most 16M).
    """
    flat = values[mask.bool()].sort().values
    if flat.numel() == 0:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    position = q * (flat.numel() - 1)
    low = int(position)
    high = min(low + 1, flat.numel() - 1)
    return flat[low] + (flat[high] - flat[low]) * (position - low)


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """(B,) mean of ``values (B,)`` over the rows that share ``segment (B,)``, at every row.

    The mean is taken of the differences to the segment's minimum, so that the mean of equal values is exactly
    that value: otherwise three rewards of 0.1 would differ from their mean by 1e-17, which divided by a
    standard deviation of the same size is not small.
    """
    inverse, count = _segments(segment)
    start = torch.full(count.shape, torch.inf, dtype=values.dtype, device=values.device)
    low = start.scatter_reduce(0, inverse, values, "amin")[inverse]
    total = _segment_sum(values - low, inverse, count)
    return low + (total / count)[inverse]


def segment_count(segment: Tensor) -> Tensor:
    """(B,) int64 number of rows that share each row's ``segment (B,)``."""
    inverse, count = _segments(segment)
    return count[inverse]


def segment_std(values: Tensor, segment: Tensor, ddof: int = 1) -> Tensor:
    """(B,) standard deviation of ``values (B,)`` within each ``segment (B,)``, at every row.

    It is 0 for a segment of one row with ddof 1.
    """
    inverse, count = _segments(segment)
    total = _segment_sum((values - segment_mean(values, segment)).square(), inverse, count)
    return (total / (count - ddof).clamp(min=1)).sqrt()[inverse]


def token_moments(values: Tensor, mask: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) values minus their mean, and (B,) their population variance, over all masked-in tokens of the
    rows that share ``segment (B,)``.

    Tokens weigh the same, so long rows weigh more. Differences to the minimum are averaged, as in
    ``segment_mean``, so equal values centre to exactly 0. Centred values are 0 where masked out; a segment
    without tokens has variance 0.
    """
    inverse, rows = _segments(segment)
    tokens = _segment_sum(mask.sum(1).to(values.dtype), inverse, rows).clamp(min=1)
    lowest = torch.where(mask, values, torch.inf).amin(1)
    infinity = torch.full(rows.shape, torch.inf, dtype=values.dtype, device=values.device)
    low = infinity.scatter_reduce(0, inverse, lowest, "amin")
    above = apply_mask(values - low[inverse][:, None], mask)
    mean_above = (_segment_sum(above.sum(1), inverse, rows) / tokens)[inverse]
    centred = apply_mask(above - mean_above[:, None], mask)
    return centred, (_segment_sum(centred.square().sum(1), inverse, rows) / tokens)[inverse]


def packed_left(mask: Tensor) -> Tensor:
    """(B, T) int64 columns, for ``gather``, that move the masked-in tokens of each row to its front in their
    order.
    """
    return (~mask.bool()).to(torch.int8).sort(dim=1, stable=True).indices


def window_mean(values: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, W) mean of each run of ``width`` consecutive masked-in tokens, and (B, W) bool: it is complete.

    Window w of a row starts at its w-th masked-in token; W is T - width + 1, or 0 if T is smaller.
    """
    order = packed_left(mask)
    windows = max(mask.shape[1] - width + 1, 0)
    if windows == 0:
        return values[:, :0], mask[:, :0]
    runs = apply_mask(values, mask).gather(1, order).unfold(1, width, 1)
    complete = torch.arange(windows, device=mask.device) + width <= mask.sum(1, keepdim=True)
    return runs.mean(2), complete


def row_quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """(B,) linearly interpolated quantile over the masked-in entries of each row; 0 for a row without any."""
    ordered = torch.where(mask, values, torch.inf).sort(dim=1).values
    position = q * (mask.sum(1) - 1).clamp(min=0).to(torch.float64)
    low = position.floor().to(torch.int64)
    high = torch.minimum(low + 1, (mask.sum(1) - 1).clamp(min=0))
    if values.shape[1]:
        ends = ordered.gather(1, torch.stack([low, high], 1))
    else:
        ends = ordered.new_zeros(len(ordered), 2)
    quantile = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * (position - low).to(values.dtype)
    return torch.where(mask.any(1), quantile, torch.zeros_like(quantile))


def _segments(segment: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) index of each row's segment among the distinct ones, and (S,) number of rows in each."""
    # torch.unique has no overload with these return types.
    unique = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], torch.unique)
    _, inverse, count = unique(segment, return_inverse=True, return_counts=True)
    return inverse, count


def _segment_sum(values: Tensor, inverse: Tensor, count: Tensor) -> Tensor:
    return torch.zeros(count.shape[0], dtype=values.dtype, device=values.device).index_add(0, inverse, values)


_ALL_ROWS = slice(None)


class Fingerprint(NamedTuple):
    """Two float64 sums over the rows of y = W v, with u and v fixed random signs.

    The sums of shards of rows add up to those of the whole.
    """

    projection: float  # u.y
    square: float  # |y|^2

    @property
    def number(self) -> float:
        """u.y + 8|y|, the number that is compared.

        The projection changes with any small change; the norm keeps the number away from 0, so that a
        relative comparison works.
        """
        return self.projection + 8 * math.sqrt(self.square)


def weight_fingerprint(name: str, weight: Tensor) -> Fingerprint:
    """Fingerprint of a whole weight, which differs if the weight differs.

    ``weight`` is (out, in), or (out,) for a bias or scale, where y is the weight itself; further dimensions
    count as columns.
    """
    return product_fingerprint(name, weight_product(name, weight))


def weight_product(name: str, weight: Tensor, *, first_column: int = 0, columns: int | None = None) -> Tensor:
    """(rows,) float64 y = W v of a weight or of some of its rows; the weight itself if it has one dimension.

    first_column, columns: where ``weight`` holds only some columns, their place among so many; the products
    of all columns add up to y.
    """
    if weight.ndim < 2:
        return weight.double()
    matrix = weight.flatten(1)
    signs = fingerprint_input(name, matrix.shape[1] if columns is None else columns, weight.device)
    signs = signs[first_column : first_column + matrix.shape[1]]
    if weight.device.type != "cpu":
        rows = max(1, _GPU_BLOCK // max(matrix.shape[1], 1))
        return torch.cat([part.double() @ signs for part in matrix.split(rows)])
    rows = max(1, _CPU_BLOCK // max(matrix.shape[1], 1))
    block = _cpu_block(min(rows, len(matrix)) * matrix.shape[1])
    product = torch.empty(len(matrix), dtype=torch.float64)
    with torch.no_grad():
        for part, out in zip(matrix.split(rows), product.split(rows), strict=True):
            copies = block[: part.numel()].view(part.shape).copy_(part)
            torch.mv(copies, signs, out=out)
    return product


# Entries copied to float64 at once: 2 MiB fit a CPU's cache; on a GPU, where launches cost time, 128 MiB.
_CPU_BLOCK = 1 << 18
_GPU_BLOCK = 1 << 24
_blocks = threading.local()


def _cpu_block(size: int) -> Tensor:
    """(size,) float64, this thread's own until it asks again: memory that is given back and taken anew for
    every block costs up to eight times what the sums do.
    """
    if size > _CPU_BLOCK:
        return torch.empty(size, dtype=torch.float64)
    if not hasattr(_blocks, "block"):
        with torch.inference_mode(False):  # an engine may ask first, in its mode, and a learner afterwards
            _blocks.block = torch.empty(_CPU_BLOCK, dtype=torch.float64)
    return _blocks.block[:size]


def fingerprint_input(name: str, columns: int, device: torch.device) -> Tensor:
    """(columns,) float64 random signs v of the weight called ``name``; exact in every floating-point type."""
    return _signs(name, "in", columns, device).double()


def product_fingerprint(name: str, product: Tensor) -> Fingerprint:
    """Fingerprint from ``product (out,)`` = W v, for engines that can run a layer but not read its packed
    weight.
    """
    projection, norm = product_sums(name, product).tolist()
    return Fingerprint(projection, norm * norm)  # the root of the rounded square of a norm is that norm


def product_sums(
    name: str, product: Tensor, *, rows: Tensor | slice = _ALL_ROWS, count: int | None = None
) -> Tensor:
    """(2,) float64 u.y and |y| of ``product (n,)``, which are ``rows`` of the ``count`` rows of y."""
    product = product.double()
    signs = _signs(name, "out", product.shape[0] if count is None else count, product.device)
    return torch.stack([signs[rows].double() @ product, product.norm()])


# A byte per row and column of a large model's weights is cached: drawing signs costs more than using them.
@lru_cache(maxsize=4096)
def _signs(name: str, end: str, size: int, device: torch.device) -> Tensor:
    """(size,) int8, -1 or 1."""
    generator = torch.Generator().manual_seed(stable_hash(name, end, size))
    bits = torch.randint(0, 2, (size,), generator=generator)
    return (bits * 2 - 1).to(device, torch.int8)
