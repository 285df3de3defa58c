"""The checksum of weights sees every bit and every place, and no division among ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from rltrain.learner import checksum
from rltrain.learner.checksum import digest_of_sums, sum_parts
from rltrain.types.tensor_parts import TensorPart


def digest(weights: torch.Tensor, cuts: list[int]) -> str:
    edges = [0, *sorted(cuts), len(weights)]
    parts = [
        TensorPart("w", tuple(weights.shape), start, weights[start:stop]) for start, stop in pairwise(edges)
    ]
    return digest_of_sums([sum_parts([part]) for part in parts])


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 37), max_size=3))
def test_ranks_agree_however_they_divide_a_weight(seed: int, cuts: list[int]) -> None:
    weights = torch.randn(37, generator=torch.Generator().manual_seed(seed))
    assert digest(weights, cuts) == digest(weights, [])


@given(place=st.integers(0, 36), bit=st.integers(0, 31))
def test_every_bit_counts(place: int, bit: int) -> None:
    weights = torch.randn(37, generator=torch.Generator().manual_seed(0))
    changed = weights.clone()
    changed.view(torch.int32)[place] ^= (1 << bit) - (2**32 if bit == 31 else 0)
    assert digest(changed, []) != digest(weights, [])


def test_places_and_signs_of_zero_count() -> None:
    weights = torch.tensor([1.0, 2.0, 0.0])
    assert digest(weights[[1, 0, 2]], []) != digest(weights, []) != digest(torch.tensor([1.0, 2.0, -0.0]), [])


def test_chunks_make_no_difference(monkeypatch) -> None:
    weights = torch.randn(1000)
    expected = digest(weights, [])
    monkeypatch.setattr(checksum, "_CHUNK", 7)
    assert digest(weights, []) == expected
