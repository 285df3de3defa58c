"""AAPO and GRAO: rows of other sources in the policy's groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage.group import group_mean, group_norm
from rltrain.advantage.reference import aapo, grao
from rltrain.types.samples import SOURCE_DATASET, SOURCE_POLICY, SOURCE_REFERENCE, SOURCE_TEMPERED

P = SOURCE_POLICY
R = SOURCE_REFERENCE
Y = SOURCE_DATASET
NAN = math.nan


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


# AAPO -------------------------------------------------------------------------------------------------------


def test_a_group_that_is_all_right_learns_from_a_failing_reference():
    got = aapo(f64([1, 1, 0, 0]), ids(5, 5, 5, 5), source=ids(P, P, R, R))
    assert_close(got, f64([0.28, 0.28, 0, 0]))


def test_a_reference_that_does_as_well_leaves_dr_grpo():
    rewards = f64([1, 0, 0.5, 1, 0, 0.5])
    got = aapo(rewards, ids(*[2] * 6), source=ids(P, P, P, R, R, R))
    assert_close(got[:3], group_mean(rewards[:3], ids(2, 2, 2)))


def test_both_failing_is_no_signal():
    assert not aapo(f64([0, 0, 0, 0]), ids(1, 1, 1, 1), source=ids(P, R, P, R)).any()


def test_rows_are_paired_by_order_within_their_prompt_wherever_they_stand():
    # prompt 8: rewards 1, 0 with references 0, 1; prompt 3: reward 1 with reference 1
    rewards = f64([1, 0, 1, 1, 1, 0])
    group = ids(8, 8, 3, 3, 8, 8)
    source = ids(P, R, P, R, R, P)
    got = aapo(rewards, group, source=source)
    # prompt 8: policy rows 0 (1) and 5 (0), mean 0.5; reference rows 1 (0) and 4 (1): margins +0.28 and -0.2
    assert_close(got, f64([0.5 + 0.28, 0, 0, 0, 0, -0.5 - 0.2]))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    with_mean = aapo(rewards[order], group[order], source=source[order], reference="mean")
    assert_close(with_mean, aapo(rewards, group, source=source, reference="mean")[order])


def test_the_mean_of_the_references_needs_no_partner():
    got = aapo(
        f64([1, 0, 0, 1, 1, 1]),
        ids(*[0] * 6),
        source=ids(P, P, R, R, R, R),
        reference="mean",
        low=-1.0,
        high=1.0,
    )
    assert_close(got, f64([0.5 + 0.25, -0.5 - 0.75, 0, 0, 0, 0]))
    with pytest.raises(
        ValueError,
        match=r"2 rows of the policy came with 4 of the reference; .* set advantage.reference to mean",
    ):
        aapo(f64([1, 0, 0, 1, 1, 1]), ids(*[0] * 6), source=ids(P, P, R, R, R, R))


def test_an_ungraded_reference_gives_no_margin_and_an_ungraded_row_no_advantage():
    got = aapo(f64([1, 0, NAN, NAN, 1, 0]), ids(*[0] * 6), source=ids(P, P, P, R, R, R))
    assert_close(got, f64([0.5, -0.5 - 0.2, 0, 0, 0, 0]))
    no_reference = aapo(f64([1, 0, NAN, NAN]), ids(*[0] * 4), source=ids(P, P, R, R), reference="mean")
    assert_close(no_reference, f64([0.5, -0.5, 0, 0]))


def test_rows_of_other_sources_get_nothing():
    got = aapo(f64([1, 0, 9, 0, 0]), ids(*[0] * 5), source=ids(P, P, SOURCE_TEMPERED, R, R))
    assert_close(got, f64([0.5 + 0.28, -0.5, 0, 0, 0]))


# GRAO -------------------------------------------------------------------------------------------------------


def objective(rewards: Tensor, source: Tensor, j: Tensor, beta: float, lam: float) -> Tensor:
    """J_GRAO of one prompt as printed in the paper, statistics over samples and answer."""
    a = (rewards - rewards.mean()) / rewards.std(correction=0)
    o = source == P
    y = source == Y
    return (a * j)[o].mean() + beta * (a * j)[y].sum() + lam * (a[o] * (j[o] - j[y])).mean()


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_with_these_weights_is_the_objectives_gradient(seed: int):
    # two prompts with 3 and 2 samples; the aggregate divides by all 7 rows
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(7, generator=generator, dtype=torch.float64)
    group = ids(4, 4, 4, 4, 6, 6, 6)
    source = ids(P, P, P, Y, Y, P, P)
    j = -torch.rand(7, generator=generator, dtype=torch.float64)
    weights = grao(rewards, group, source=source, mask=torch.ones(7, 2), eps=0.0)
    want = (
        sum(objective(rewards[group == g], source[group == g], j[group == g], 0.5, 0.6) for g in (4, 6)) / 2
    )
    assert_close((weights * j).sum() / 7, want)


def test_without_imitation_and_alignment_it_is_reinforce_with_group_advantages():
    rewards = f64([0.2, 0.6, 0.4, 0.8])
    source = ids(P, P, P, Y)
    got = grao(
        rewards,
        ids(1, 1, 1, 1),
        source=source,
        mask=torch.ones(4, 1),
        beta=0.0,
        lam=0.0,
        statistics="samples",
    )
    want = group_norm(rewards[:3], ids(1, 1, 1), ddof=0)
    assert_close(got, torch.cat([want * 4 / 3, f64([0.0])]))  # divided by 4 rows, meant to be divided by 3


def test_the_printed_statistics_leave_nothing_of_the_alignment_to_the_answer():
    rewards = f64([0.2, 0.6, 0.4, 0.8])
    source = ids(P, P, P, Y)
    without_alignment, with_alignment = (
        grao(
            rewards,
            ids(1, 1, 1, 1),
            source=source,
            mask=torch.ones(4, 1),
            beta=0.5,
            lam=lam,
            statistics="samples",
        )
        for lam in (0.0, 0.6)
    )
    assert_close(without_alignment[3], with_alignment[3])


@pytest.mark.parametrize("statistics", ["joint", "samples"])
def test_a_missing_or_ungraded_answer_takes_its_terms_along(statistics: str):
    rewards = f64([1, 0, NAN, 1, 0])
    source = ids(P, P, Y, P, P)
    mask = torch.ones(5, 1)
    got = grao(rewards, ids(1, 1, 1, 2, 2), source=source, mask=mask, lam=0.6, statistics=statistics)  # type: ignore[arg-type]
    assert got[2] == 0
    assert_close(got[:2], got[3:])
    assert_close(got[3:], 1.6 * f64([1, -1]) / 2 * (4 / 2), atol=1e-5, rtol=0)  # 4 graded rows, 2 prompts


@pytest.mark.parametrize("statistics", ["joint", "samples"])
def test_rows_without_tokens_and_prompts_without_samples_stay_finite(statistics: str):
    rewards = f64([1, 0, 1, 1, NAN])
    source = ids(P, P, Y, Y, P)
    mask = torch.tensor([[1], [0], [1], [1], [1]])
    got = grao(rewards, ids(1, 1, 1, 2, 2), source=source, mask=mask, statistics=statistics)  # type: ignore[arg-type]
    assert got.isfinite().all()
    assert got[1] == 0 and got[3] == 0 and got[4] == 0
