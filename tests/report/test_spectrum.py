"""RankMe and alpha-ReQ against spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rltrain.report.spectrum import alpha_req, rank_me, spectrum_metrics


def with_singular_values(values: Tensor, rows: int = 64) -> Tensor:
    """(rows, K) states whose singular values are ``values`` and whose mean is 0."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double()).Q
    return left * values @ right


def test_the_rank_is_the_number_of_directions_that_are_used_alike() -> None:
    assert rank_me(with_singular_values(torch.ones(7))) == pytest.approx(7, abs=1e-4)
    assert rank_me(with_singular_values(torch.tensor([5.0, 0.0, 0.0]))) == pytest.approx(1, abs=1e-4)
    # shares 1/2, 1/4, 1/4: exp(1.5 ln 2) = 2 sqrt 2
    assert rank_me(with_singular_values(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(
        2 * math.sqrt(2), abs=1e-4
    )
    states = with_singular_values(torch.rand(9))
    assert rank_me(3 * states) == pytest.approx(rank_me(states))  # the scale does not count


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("count", [12, 60])
def test_a_power_laws_exponent_comes_out(alpha: float, count: int) -> None:
    eigenvalues = torch.arange(1, count + 1, dtype=torch.float64) ** -alpha
    states = with_singular_values(eigenvalues.sqrt(), rows=80)
    assert alpha_req(states) == pytest.approx(alpha, abs=1e-6)
    assert alpha_req(states + 5.0) == pytest.approx(alpha, abs=1e-6)  # the mean does not count


def test_too_few_states_have_no_spectrum() -> None:
    assert math.isnan(alpha_req(torch.ones(3, 4)))
    assert math.isnan(alpha_req(torch.ones(64, 8)))
    assert math.isnan(rank_me(torch.zeros(3, 4)))
    assert set(spectrum_metrics(torch.rand(9, 4))) == {"eval/rank_me", "eval/alpha_req"}
