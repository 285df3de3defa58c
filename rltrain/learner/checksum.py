"""A checksum of the trained weights that does not depend on how ranks divide them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from rltrain.types.tensor_parts import TensorPart

__all__ = ["digest_of_sums", "sum_parts"]

_CHUNK = 2**22  # numbers at a time: bounds the memory beside the weights
_STRIDE = 0x9E3779B97F4A7C15 - 2**64  # odd, so that every place has another odd factor
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def sum_parts(parts: Iterable[TensorPart]) -> dict[str, int]:
    """By name, the sum over a part's numbers of their bits times an odd factor of their place, modulo 2^64.

    Integer sums are the same in any order, and those of a tensor's parts add up to the tensor's.
    """
    sums: dict[str, int] = {}
    for part in parts:
        bits = part.values.detach().contiguous().view(_BITS[part.values.element_size()])
        total = 0
        for first in range(0, bits.numel(), _CHUNK):
            values = bits[first : first + _CHUNK].to(torch.int64)
            places = torch.arange(first, first + len(values), device=values.device) + part.start
            total += int((values * (2 * places * _STRIDE + 1)).sum())
        sums[part.name] = (sums.get(part.name, 0) + total) % 2**64
    return sums


def digest_of_sums(shares: Iterable[dict[str, int]]) -> str:
    """SHA-256 over the sums of all ranks' parts."""
    totals: dict[str, int] = {}
    for share in shares:
        for name, value in share.items():
            totals[name] = (totals.get(name, 0) + value) % 2**64
    return hashlib.sha256(repr(sorted(totals.items())).encode()).hexdigest()
