from __future__ import annotations

import pytest
import torch

from rltrain.checkpoint.soup import soup

ONE = {"w": torch.tensor([1.0, -2.0, 0.5]), "steps": torch.tensor(7)}
TWO = {"w": torch.tensor([0.2, -1.0, 1.5]), "steps": torch.tensor(7)}


def test_the_soup_is_the_weighted_mean():
    torch.testing.assert_close(soup([ONE, TWO], [0.5, 0.5])["w"], torch.tensor([0.6, -1.5, 1.0]))
    torch.testing.assert_close(soup([ONE, TWO], [0.75, 0.25])["w"], torch.tensor([0.8, -1.75, 0.75]))
    torch.testing.assert_close(soup([ONE, TWO], [0.5, 0.5])["w"], soup([TWO, ONE], [0.5, 0.5])["w"])
    assert torch.equal(soup([ONE, TWO], [1.0, 0.0])["w"], ONE["w"])
    assert torch.equal(soup([ONE, ONE, ONE], [0.2, 0.3, 0.5])["steps"], torch.tensor(7))


def test_a_weight_of_zero_does_not_read_the_model():
    broken = {**TWO, "w": torch.full((3,), torch.nan)}
    assert torch.equal(soup([ONE, broken], [1.0, 0.0])["w"], ONE["w"])


def test_it_is_accumulated_in_float32_and_given_back_in_the_models_dtype():
    # bfloat16 has 8 bits: 256 + 1 = 256 there. Twelve models of 256 and 4 of 260 average to 257, which rounds
    # to 258 or 256; accumulating in bfloat16 would drift from the mean rounded once
    models = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 1.0078125, 1.015625)]
    mixed = soup(models, [1 / 3, 1 / 3, 1 / 3])["w"]
    assert mixed.dtype == torch.bfloat16 and float(mixed) == 1.0078125


def test_the_models_are_left_alone():
    kept = ONE["w"].clone()
    soup([ONE, TWO], [0.5, 0.5])["w"].add_(1)
    assert torch.equal(ONE["w"], kept)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=r"sum to 1\.5"):
        soup([ONE, TWO], [0.5, 1.0])
    with pytest.raises(ValueError, match="2 models and 1 weights"):
        soup([ONE, TWO], [1.0])
    with pytest.raises(ValueError, match="model 2 has other weights than model 1: v, w"):
        soup([ONE, {"v": ONE["w"], "steps": ONE["steps"]}], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"weight w has shapes \(3,\), \(2,\)"):
        soup([ONE, {**TWO, "w": torch.zeros(2)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="steps is not floating point and differs"):
        soup([ONE, {**TWO, "steps": torch.tensor(8)}], [0.5, 0.5])
