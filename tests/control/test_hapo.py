"""HAPO's signal and the temperature that follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control.hapo import EntropySignal, adaptive_temperature, entropy_signal, hapo
from rltrain.types.policy import TrainBatch

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
ENTROPY = torch.tensor([[0.9, 0.7, 1.2], [1.1, 0.55, math.nan]]).double()  # the common batch


def batch_of(entropy: Tensor, mask: Tensor) -> TrainBatch:
    rows = torch.zeros(len(mask), dtype=torch.int64)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    return TrainBatch(
        mask=mask,
        advantages=zeros,
        weights=zeros + 1,
        rewards=rows.double(),
        group=rows,
        source=rows,
        version=rows,
        entropy_now=entropy,
    )


def signal_of(entropy: Tensor = ENTROPY, mask: Tensor = MASK) -> EntropySignal:
    signal = entropy_signal(entropy, mask)
    assert signal is not None
    return signal


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 10, 41])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 1.0])
def test_the_pivot_is_numpys_nearest_quantile(tokens: int, rho: float):
    entropy = torch.rand(1, tokens, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    signal = entropy_signal(entropy, torch.ones(1, tokens), rho)
    assert signal is not None
    assert signal.pivot == pytest.approx(
        np.quantile(np.log(entropy.numpy()), rho, method="nearest"), abs=1e-15
    )


def test_the_signal_fills_minus_1_to_1_and_does_not_see_the_unit_of_entropy():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    h_hat = hapo(batch_of(entropy, torch.ones(4, 9))).extra["h_hat"]
    assert h_hat.max() == 1 and h_hat.min() == -1
    assert_close(hapo(batch_of(entropy / math.log(2), torch.ones(4, 9))).extra["h_hat"], h_hat)  # bits
    assert (h_hat.flatten()[entropy.flatten().argsort()].diff() >= 0).all()


def test_the_released_form_loses_the_sign_of_certain_tokens():
    released = hapo(batch_of(ENTROPY, MASK), form="released").extra["h_hat"]
    assert (released >= 0).all()
    assert_close(released, hapo(batch_of(ENTROPY, MASK)).extra["h_hat"].abs())


def test_equal_entropies_have_no_signal():
    after = hapo(batch_of(torch.full((2, 3), 0.7).double(), MASK))
    assert torch.equal(after.extra["h_hat"], torch.zeros(2, 3).double())
    assert not hapo(batch_of(ENTROPY, torch.zeros(2, 3))).extra["h_hat"].any()


def test_zero_entropy_is_finite():
    # the pivot is the last token (0.8 x 2 = 1.6, nearest 2): h is 0 there, ln(1/2) at the second, ln(1e-8 /
    # 2) at the first
    h_hat = hapo(batch_of(torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.ones(1, 3))).extra["h_hat"]
    assert_close(h_hat, torch.tensor([[-1.0, math.log(0.5) / -math.log(1e-8 / 2), 0.0]]).double())


def test_temperatures_are_those_of_the_paper_and_the_release():
    signal = signal_of()
    entropy = torch.where(MASK, ENTROPY, 1.0)
    expected = {
        ("scaled", 0.05): [[0.9855246691402507, 0.9673961651710153, 1.05], [1.0, 0.95, 0.0]],
        ("released", 0.05): [[1.0144753308597492, 1.0326038348289848, 1.05], [1.0, 1.05, 0.0]],
        ("unscaled", 0.1): [
            [0.9475747562202045, 0.8819188310355957, 1.0227317329009675],
            [1.0, 0.8189152141400392, 0.0],
        ],
    }
    for (variant, tau), want in expected.items():
        got = adaptive_temperature(entropy, signal, 1.0, tau, variant)  # type: ignore[arg-type]
        assert_close(got * MASK, torch.tensor(want).double(), atol=1e-6, rtol=0)


def test_tokens_beyond_the_last_steps_range_are_clamped():
    got = adaptive_temperature(torch.tensor([1e-6, 50.0]).double(), signal_of(), 0.8, 0.05)
    assert_close(got, torch.tensor([0.76, 0.84]).double())


def test_without_a_signal_or_with_tau_0_the_temperature_is_the_base():
    entropy = torch.rand(5).double()
    assert_close(adaptive_temperature(entropy, None, 0.7, 0.1), torch.full((5,), 0.7).double())
    assert_close(adaptive_temperature(entropy, signal_of(), 0.7, 0.0), torch.full((5,), 0.7).double())


def test_a_missing_entropy_is_named():
    with pytest.raises(ValueError, match="hapo needs entropy_now"):
        hapo(batch_of(ENTROPY, MASK).replace(entropy_now=None))
