"""Process rewards from log-ratios, PRIME's returns, its filter and its accuracy; numbers of
arXiv:2412.01981 and 2502.01456.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rltrain.advantage.group import rloo
from rltrain.advantage.process import (
    aggregate_steps,
    contrast_accuracy,
    is_accuracy_within,
    prime,
    step_rewards,
    token_rewards,
)
from support.worked_steps import BETA, RHO, SCORES

LOG_RATIO = torch.tensor([RHO], dtype=torch.float64)
STEPS = torch.tensor([[0, 0, 1, 1, 2, 2]])  # steps end at tokens 1, 3 and 5
ALL = torch.ones(1, 6, dtype=torch.bool)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor, expected: Any) -> bool:
    """Equal to 1e-6, with the same shape."""
    expected_tensor = doubles(expected)
    return got.shape == expected_tensor.shape and torch.allclose(got, expected_tensor, rtol=0, atol=1e-6)


def test_token_rewards_and_their_running_sum():
    rewards = token_rewards(LOG_RATIO - 3, torch.full_like(LOG_RATIO, -3), ALL, BETA)
    assert close(rewards, [[0.02, -0.01, 0.005, 0.015, -0.025, 0.01]])
    assert close(rewards.cumsum(1), [[0.02, 0.01, 0.015, 0.03, 0.005, 0.015]])


@pytest.mark.parametrize(("series", "reduction", "score"), SCORES)
def test_one_score_per_response(series: Any, reduction: Any, score: float):
    step, present = step_rewards(BETA * LOG_RATIO, STEPS)
    assert close(step, [[0.01, 0.02, -0.015]])
    assert close(aggregate_steps(step, present, series=series, reduction=reduction), [score])
    # beside a longer response and one without any token: rows are scored by themselves
    rewards = torch.cat([BETA * LOG_RATIO, torch.full((2, 6), 9.0).double()])
    step, present = step_rewards(
        rewards, torch.cat([STEPS, torch.tensor([[0, 1, 2, 3, 4, 4]]), torch.full((1, 6), -1)])
    )
    assert present.sum(1).tolist() == [3, 5, 0]
    scores = aggregate_steps(step, present, series=series, reduction=reduction)
    assert close(scores[[0, 2]], [score, 0.0])


def test_a_response_is_worth_the_same_however_it_is_cut():
    rewards = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double()
    cuts = [STEPS, torch.zeros_like(STEPS), torch.arange(6)[None], torch.tensor([[0, 1, 1, 1, 1, 2]])]
    sums = [float(aggregate_steps(*step_rewards(rewards, cut), reduction="sum")) for cut in cuts]
    last = [
        float(aggregate_steps(*step_rewards(rewards, cut), series="cumulative", reduction="last"))
        for cut in cuts
    ]
    assert sums == pytest.approx([float(rewards.sum())] * 4) and last == pytest.approx(sums)
    # the smallest step depends on the cut
    assert len({round(float(aggregate_steps(*step_rewards(rewards, cut))), 9) for cut in cuts}) > 1


def test_what_stands_outside_the_mask_does_not_count():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0]]).bool()
    spoiled = torch.where(mask, LOG_RATIO, torch.nan)
    rewards = token_rewards(spoiled, torch.zeros_like(LOG_RATIO), mask, 1.0)
    assert close(rewards, [[0.4, -0.2, 0, 0.3, 0, 0]])
    step, present = step_rewards(spoiled, torch.tensor([[0, 0, -1, 1, -1, -1]]))
    assert close(step, [[0.2, 0.3]])
    assert present.all()


def test_the_running_sum_is_the_soft_value_over_the_references_continuations():
    # q_1 = beta log E_ref[exp(r / beta) | y_1] on a two-step binary tree with r = beta log(pi / ref)
    pi1 = doubles([0.7, 0.3])
    ref1 = doubles([0.4, 0.6])
    pi2 = doubles([[0.2, 0.8], [0.5, 0.5]])
    ref2 = doubles([[0.5, 0.5], [0.25, 0.75]])
    paths = [(a, b) for a in (0, 1) for b in (0, 1)]
    logp = torch.stack([torch.stack([pi1[a], pi2[a, b]]) for a, b in paths]).log()
    ref = torch.stack([torch.stack([ref1[a], ref2[a, b]]) for a, b in paths]).log()
    mask = torch.ones(4, 2, dtype=torch.bool)
    q = token_rewards(logp, ref, mask, 0.5).cumsum(1)
    soft = 0.5 * torch.log((ref2 * torch.exp(q[:, 1].reshape(2, 2) / 0.5)).sum(1))
    torch.testing.assert_close(q[[0, 2], 0], soft)
    assert close(soft, [0.279808, -0.346574])


# PRIME ------------------------------------------------------------------------------------------------------

PROCESS = doubles([[0.2, -0.1, 0.3], [0.05, 0.1, 0.0], [-0.3, 0.1, -0.2], [0.4, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
OUTCOME = doubles([1.0, 0.0, 0.0, 1.0])
GROUP = torch.tensor([3, 3, 3, 3])


def run(
    rewards: Tensor = OUTCOME,
    group: Tensor = GROUP,
    mask: Tensor = MASK,
    process: Tensor = PROCESS,
    **hp: Any,
) -> Tensor:
    return prime(rewards, group, mask=mask, process_reward=process, **hp)


def by_loops(
    rewards: np.ndarray,
    group: list[int],
    mask: np.ndarray,
    rho: np.ndarray,
    *,
    released: bool,
    g_p: float,
    g_o: float,
) -> np.ndarray:
    """PRIME's steps 6 to 8, response by response and token by token."""
    lengths = [int(row.sum()) for row in mask]
    suffix = [[sum(rho[i, t:end]) for t in range(end)] for i, end in enumerate(lengths)]
    scale = max(abs(value) for row in suffix for value in row) + 1e-6
    r = rho / scale
    members = defaultdict(list)
    for i, g in enumerate(group):
        members[g].append(i)
    out = np.zeros_like(rho)
    for rows in members.values():
        n = len(rows)
        mean = {i: sum(r[i, : lengths[i]]) / lengths[i] for i in rows}
        for i in rows:
            others = [j for j in rows if j != i]
            b = rewards[i] - sum(rewards[j] for j in others) / (n - 1)
            for t in range(lengths[i]):
                total = g_o ** (lengths[i] - 1 - t) * b
                for s in range(t, lengths[i]):
                    if released:
                        a = n / (n - 1) * r[i, s] - sum(mean.values()) / (n - 1)
                    else:
                        a = r[i, s] - sum(mean[j] for j in others) / (n - 1)
                    total += g_p ** (s - t) * a
                out[i, t] = total
    kept = out[mask]
    out[mask] = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    return out


@pytest.mark.parametrize("baseline", ["others", "released"])
@pytest.mark.parametrize(("g_p", "g_o"), [(1.0, 1.0), (0.9, 0.7)])
def test_prime_is_the_page_written_out(baseline: Any, g_p: float, g_o: float):
    rng = np.random.default_rng(0)
    group = [5, 5, 5, 8, 8, 5, 8, 8, 8]
    lengths = [4, 1, 6, 3, 2, 5, 6, 1, 4]
    mask = np.arange(6)[None] < np.array(lengths)[:, None]
    rho = rng.normal(size=(9, 6)) * mask
    outcome = rng.integers(0, 2, 9).astype(float)
    got = run(
        doubles(outcome),
        torch.tensor(group),
        torch.tensor(mask),
        doubles(rho),
        baseline=baseline,
        process_gamma=g_p,
        outcome_gamma=g_o,
    )
    expected = by_loops(outcome, group, mask, rho, released=baseline == "released", g_p=g_p, g_o=g_o)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_the_two_baselines_agree_on_first_tokens_and_one_token_responses():
    # "released" is "others" plus (r - the response's mean r) / (n - 1), whose sum over a response is 0;
    # whitening is an affine map
    paper = run(scale="none")
    released = run(scale="none", baseline="released")
    slope = (paper[0, 0] - paper[2, 0]) / (released[0, 0] - released[2, 0])
    aligned = paper[0, 0] + slope * (released - released[0, 0])
    torch.testing.assert_close(aligned[:, 0], paper[:, 0])
    assert not torch.allclose(aligned[MASK], paper[MASK])


@pytest.mark.parametrize("baseline", ["others", "released"])
def test_primes_advantages_are_white_and_blind_to_scale_and_padding(baseline: Any):
    base = run(baseline=baseline)
    assert float(base[MASK].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(base[MASK].var()) == pytest.approx(1.0, abs=1e-6)
    assert (base[~MASK] == 0).all()
    torch.testing.assert_close(
        run(baseline=baseline, process_weight=5.0, outcome_weight=5.0), base, rtol=0, atol=1e-6
    )
    wide = run(
        mask=torch.nn.functional.pad(MASK, (0, 4)),
        process=torch.nn.functional.pad(PROCESS, (0, 4), value=torch.nan),
        baseline=baseline,
    )
    torch.testing.assert_close(wide[:, :3], base)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        run(OUTCOME[order], GROUP[order], MASK[order], PROCESS[order], baseline=baseline), base[order]
    )


def test_without_process_rewards_prime_is_whitened_rloo():
    silent = run(process=torch.zeros_like(PROCESS))
    outcome = rloo(OUTCOME, GROUP)[:, None].expand(4, 3)
    kept = outcome[MASK]
    expected = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt()
    torch.testing.assert_close(silent[MASK], expected)


def test_equal_outcomes_and_no_process_rewards_give_exactly_zero():
    assert (run(torch.ones(4).double(), process=torch.zeros_like(PROCESS)) == 0).all()


def test_ungraded_rows_take_no_part():
    graded = run(OUTCOME[:3], GROUP[:3], MASK[:3], PROCESS[:3])
    with_nan = run(doubles([1.0, 0.0, 0.0, float("nan")]))
    torch.testing.assert_close(with_nan[:3], graded)
    assert (with_nan[3] == 0).all()


def test_an_answer_alone_of_its_prompt_has_no_baseline_and_gets_the_steps_mean():
    # its own advantage is 0 before whitening
    with_one = run(group=torch.tensor([3, 3, 3, 9]))
    assert with_one.isfinite().all()
    outcome_only = run(group=torch.tensor([3, 3, 3, 9]), process_weight=0.0)
    # returns: 1 on row 0's three tokens, -1/2 on five tokens, 0 on the lone one: mean 0.5/9
    kept = doubles([1.0] * 3 + [-0.5] * 5 + [0.0])
    expected = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt()
    torch.testing.assert_close(outcome_only[MASK], expected)


def test_a_whole_reward_stands_on_the_last_token():
    # the same as token rewards that are 0 but for their sum on the last token
    sums = PROCESS.sum(1)
    moved = torch.zeros_like(PROCESS)
    for row, last in enumerate((2, 1, 2, 0)):
        moved[row, last] = sums[row]
    torch.testing.assert_close(run(granularity="whole"), run(process=moved))
    assert not torch.allclose(run(granularity="whole"), run())


def test_prime_without_a_reward_model_is_an_error():
    with pytest.raises(ValueError, match="process_reward was not computed"):
        prime(OUTCOME, GROUP, mask=MASK)


def test_prompts_are_kept_by_accuracy_with_both_ends_included():
    # accuracies 0, 1/4, 1/2, 3/4, 1, then exactly 0.2 and 0.8 of five
    wins = {10: (0, 4), 11: (1, 4), 12: (2, 4), 13: (3, 4), 14: (4, 4), 15: (1, 5), 16: (4, 5)}
    group = torch.tensor([g for g, (_, n) in wins.items() for _ in range(n)])
    correct = torch.tensor([float(i < w) for w, n in wins.values() for i in range(n)])
    keep = is_accuracy_within(correct, group)
    assert {int(g) for g in group[keep]} == {11, 12, 13, 15, 16}
    # ungraded answers do not count: 1 of 2 graded
    assert is_accuracy_within(
        torch.tensor([1.0, 0.0, float("nan"), float("nan")]), torch.zeros(4).long()
    ).all()
    assert not is_accuracy_within(torch.tensor([float("nan")] * 2), torch.zeros(2).long()).any()


def test_contrast_accuracy_by_brute_force():
    rng = np.random.default_rng(1)
    score = rng.normal(size=20)
    outcome = rng.choice([0.0, 0.5, 1.0], 20)
    group = rng.integers(0, 5, 20)
    outcome[group == 3] = 1.0  # a prompt without contrast counts 0.5
    accuracies = []
    for g in sorted(set(group)):
        pairs = [(i, j) for i, j in itertools.combinations(np.flatnonzero(group == g), 2)]
        weight = sum(abs(outcome[i] - outcome[j]) for i, j in pairs)
        right = sum(
            abs(outcome[i] - outcome[j]) * ((score[i] > score[j]) == (outcome[i] > outcome[j]))
            for i, j in pairs
        )
        accuracies.append(right / weight if weight else 0.5)
    got = contrast_accuracy(doubles(score), doubles(outcome), torch.tensor(group))
    assert float(got) == pytest.approx(np.mean(accuracies))
