from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rltrain.tensor_ops import (
    apply_mask,
    masked_mean,
    masked_quantile,
    masked_sum,
    row_quantile,
    segment_count,
    segment_mean,
    segment_std,
    token_moments,
)

VALUES = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.double()])
def test_reductions_see_only_what_is_masked_in(mask: torch.Tensor):
    assert apply_mask(VALUES, mask).tolist() == [[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]]
    assert masked_sum(VALUES, mask).item() == 7.0
    assert masked_sum(VALUES, mask, dim=1).tolist() == [3.0, 4.0]
    assert_close(masked_mean(VALUES, mask).item(), 7 / 3)
    assert masked_mean(VALUES, mask, dim=1).tolist() == [1.5, 4.0]
    assert masked_mean(VALUES, mask).dtype == torch.float64


def test_what_is_masked_out_gets_gradient_zero_even_if_it_is_nan():
    values = VALUES.clone().requires_grad_()
    masked_sum(apply_mask(values, MASK).exp(), MASK).backward()
    assert values.grad is not None and not values.grad[~MASK.bool()].any() and values.grad[MASK.bool()].all()


def test_a_mean_over_nothing_is_zero():
    assert masked_mean(VALUES, torch.zeros(2, 3)).item() == 0.0
    assert masked_quantile(VALUES, torch.zeros(2, 3), 0.5).item() == 0.0


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_are_those_of_torch(q: float):
    values = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = values > -0.5
    assert_close(masked_quantile(values, mask, q), values[mask].quantile(q))


def test_segments_are_ids():
    segment = torch.tensor([900, -3, 900, -3, 900])
    values = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0], dtype=torch.float64)
    assert segment_mean(values, segment).tolist() == [3.0, 15.0, 3.0, 15.0, 3.0]
    assert segment_count(segment).tolist() == [3, 2, 3, 2, 3]
    for ddof in (0, 1):
        high = values[[0, 2, 4]].std(correction=ddof)
        low = values[[1, 3]].std(correction=ddof)
        assert_close(segment_std(values, segment, ddof), torch.stack([high, low, high, low, high]))


def test_the_deviation_of_one_row_is_zero():
    assert segment_std(torch.tensor([3.0]), torch.tensor([1])).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8 + 0.1, -0.7])
def test_equal_values_average_to_themselves_exactly(dtype: torch.dtype, value: float):
    for count in range(1, 18):
        values = torch.full((count,), value, dtype=dtype)
        assert torch.equal(segment_mean(values, torch.zeros(count, dtype=torch.int64)), values)
        assert not segment_std(values, torch.zeros(count, dtype=torch.int64)).any()


def test_segments_of_an_empty_tensor_are_empty():
    assert segment_mean(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_token_moments_are_numpys_over_the_tokens_of_a_segment():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 4, generator=generator) > 0.4
    segment = torch.tensor([2, 9, 2, 9, 50])
    mask[4] = False
    centred, variance = token_moments(values.masked_fill(~mask, math.nan), mask, segment)
    for segment_id in (2, 9):
        rows = segment == segment_id
        tokens = values[rows][mask[rows]]
        assert_close(centred[rows][mask[rows]], tokens - tokens.mean())
        assert_close(variance[rows], tokens.var(correction=0).expand(int(rows.sum())))
    assert not centred[~mask].any() and variance[4] == 0


def test_token_moments_of_equal_values_are_exactly_zero():
    centred, variance = token_moments(
        torch.full((3, 3), 0.1), torch.ones(3, 3, dtype=torch.bool), torch.tensor([1, 1, 1])
    )
    assert not centred.any() and not variance.any()


@pytest.mark.parametrize("q", [0.0, 0.3, 0.95, 1.0])
def test_row_quantiles_are_numpys(q: float):
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 0])[:, None]
    got = row_quantile(values, mask, q)
    assert_close(
        got[:3],
        torch.tensor([np.quantile(values[row, : int(mask[row].sum())].numpy(), q) for row in range(3)]),
    )
    assert got[3] == 0
