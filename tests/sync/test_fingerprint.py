"""Fingerprints: what moves them, what does not, and how a mismatch is reported."""

from __future__ import annotations

import math

import pytest
import torch

from rltrain.sync.fingerprint import WeightMismatchError, compare
from rltrain.tensor_ops import Fingerprint, fingerprint_input, product_fingerprint, weight_fingerprint

WEIGHT = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))


def test_running_a_layer_on_the_signs_gives_the_fingerprint_of_its_weight() -> None:
    product = torch.nn.functional.linear(
        fingerprint_input("w", 30, torch.device("cpu"))[None].float(), WEIGHT
    )[0]
    assert math.isclose(
        product_fingerprint("w", product).number, weight_fingerprint("w", WEIGHT).number, rel_tol=1e-6
    )


@pytest.mark.parametrize("size", [1e-30, 0.02, 1.0, 3e4])
def test_the_number_is_the_projection_and_eight_norms_to_the_last_bit(size: float) -> None:
    # by way of the norm's square: the root of a rounded square is the number itself, in binary floating point
    for seed in range(200):
        y = size * torch.randn(37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        signs = torch.tensor(
            [product_fingerprint("w", unit).projection for unit in torch.eye(37, dtype=torch.float64)]
        ).double()
        assert product_fingerprint("w", y).number == float(signs @ y + 8 * y.norm())
    assert product_fingerprint("w", torch.zeros(37)).number == 0


@pytest.mark.parametrize("cut", [1, 17, 39])
def test_the_sums_of_row_shards_add_up_to_the_weights(cut: int) -> None:
    product = WEIGHT.double() @ fingerprint_input("w", 30, torch.device("cpu"))
    place = torch.arange(40)
    above, below = (
        product_fingerprint("w", torch.where(rows, product, 0.0)) for rows in (place < cut, place >= cut)
    )
    both = Fingerprint(above.projection + below.projection, above.square + below.square)
    assert math.isclose(both.number, weight_fingerprint("w", WEIGHT).number, rel_tol=1e-14)


def test_a_bias_of_one_entry_is_eight_times_its_size_plus_or_minus_itself() -> None:
    # y = w = 3: |y| is 3 and u is 1 or -1, so 8 * 3 +- 3
    assert weight_fingerprint("b", torch.tensor([3.0])).number in (27.0, 21.0)


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
    assert not math.isclose(
        weight_fingerprint("w", other).number, weight_fingerprint("w", WEIGHT).number, rel_tol=1e-7
    )


@pytest.mark.parametrize("rows, columns", [(128, 128), (40, 30), (1000, 2000)])
def test_the_last_bit_of_one_entry_is_detected_and_the_order_of_the_sums_is_not(
    rows: int, columns: int
) -> None:
    # 2^-24 / (8 sqrt(entries)), at least 5e-12, against rounding errors of float64 sums
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    number = weight_fingerprint("w", weight).number
    other = weight.clone()
    other[rows // 2, columns // 3] = torch.nextafter(other[rows // 2, columns // 3], torch.tensor(1.0))
    assert not math.isclose(weight_fingerprint("w", other).number, number, rel_tol=1e-12)
    backwards = weight.double().flip(1) @ fingerprint_input("w", columns, torch.device("cpu")).flip(0)
    assert math.isclose(product_fingerprint("w", backwards).number, number, rel_tol=1e-14)


def test_the_same_tensor_under_two_names_has_two_numbers() -> None:
    assert weight_fingerprint("w", WEIGHT) != weight_fingerprint("v", WEIGHT)


def test_compare_names_the_first_weight_that_differs() -> None:
    learner = {name: weight_fingerprint(name, WEIGHT + more) for more, name in enumerate("abc")}
    compare(learner, dict(learner), rtol=1e-6)
    zero = Fingerprint(0.0, 0.0)
    compare({"zero": zero}, {"zero": zero}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'b'"):
        compare(learner, learner | {"b": Fingerprint(learner["b"].number * 1.01, 0.0), "c": zero}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'b'"):
        compare(learner, learner | {"b": Fingerprint(math.nan, 0.0)}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="reports no weight 'c'"):
        compare(learner, {name: learner[name] for name in "ab"}, rtol=1e-6)
    with pytest.raises(WeightMismatchError, match="'d'"):
        compare(learner, learner | {"d": Fingerprint(1.0, 0.0)}, rtol=1e-6)
