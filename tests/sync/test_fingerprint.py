"""Fingerprints: what moves them, what does not, and how a mismatch is reported."""

from __future__ import annotations

import math

import pytest
import torch

from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import fingerprint_input, product_fingerprint, weight_fingerprint

WEIGHT = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))


def test_running_a_layer_on_the_signs_gives_the_fingerprint_of_its_weight() -> None:
    product = torch.nn.functional.linear(fingerprint_input("w", 30, torch.device("cpu"))[None].float(), WEIGHT)[0]
    assert math.isclose(product_fingerprint("w", product), weight_fingerprint("w", WEIGHT), rel_tol=1e-6)


def test_a_bias_of_one_entry_is_eight_times_its_size_plus_or_minus_itself() -> None:
    # y = w = 3: |y| is 3 and u is 1 or -1, so 8 * 3 +- 3
    assert weight_fingerprint("b", torch.tensor([3.0])) in (27.0, 21.0)


@pytest.mark.parametrize("change", ["one entry", "scale", "sign", "row order", "column order"])
def test_any_change_moves_the_number(change: str) -> None:
    other = WEIGHT.clone()
    if change == "one entry":
        other[3, 4] += 1e-3
    elif change == "scale":
        other *= 1.001
    elif change == "sign":
        other *= -1
    elif change == "row order":
        other = other.flip(0)
    else:
        other = other.flip(1)
    assert not math.isclose(weight_fingerprint("w", other), weight_fingerprint("w", WEIGHT), rel_tol=1e-7)


@pytest.mark.parametrize("rows, columns", [(128, 128), (40, 30), (1000, 2000)])
def test_the_last_bit_of_one_entry_is_seen_and_the_order_of_the_sums_is_not(rows: int, columns: int) -> None:
    # 2^-24 / (8 sqrt(entries)), at least 5e-12, against rounding errors of float64 sums
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    number = weight_fingerprint("w", weight)
    other = weight.clone()
    other[rows // 2, columns // 3] = torch.nextafter(other[rows // 2, columns // 3], torch.tensor(1.0))
    assert not math.isclose(weight_fingerprint("w", other), number, rel_tol=1e-12)
    backwards = weight.double().flip(1) @ fingerprint_input("w", columns, torch.device("cpu")).flip(0)
    assert math.isclose(product_fingerprint("w", backwards), number, rel_tol=1e-14)


def test_the_same_tensor_under_two_names_has_two_numbers() -> None:
    assert weight_fingerprint("w", WEIGHT) != weight_fingerprint("v", WEIGHT)


def test_compare_names_the_first_weight_that_differs() -> None:
    learner = {name: weight_fingerprint(name, WEIGHT + more) for more, name in enumerate("abc")}
    compare(learner, dict(learner), rtol=1e-6)
    compare({"zero": 0.0}, {"zero": 0.0}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'b'"):
        compare(learner, learner | {"b": learner["b"] * 1.01, "c": 0.0}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'b'"):
        compare(learner, learner | {"b": math.nan}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="reports no weight 'c'"):
        compare(learner, {name: learner[name] for name in "ab"}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'d'"):
        compare(learner, learner | {"d": 1.0}, rtol=1e-6)
