"""ARES's shaping compared with the release's numbers, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.advantage.ares import (
    EASY,
    HARD,
    MEDIUM,
    ares,
    difficulty,
    high_windows,
    paper_cost,
    released_term,
    released_thresholds,
)
from rltrain.advantage.group import group_norm
from rltrain.tensor_ops import row_quantile, window_mean


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# released rewards for N = 4, 10, 16 against a target of 10, alpha 0.5
RELEASED = {
    (EASY, True): [1.0, 1.0, 0.5],
    (EASY, False): [0.15, 0.15, 0.27139516],
    (MEDIUM, True): [0.81818182, 1.0, 0.81818182],
    (MEDIUM, False): [0.2, 0.2, 0.32087356],
    (HARD, True): [0.96875, 1.45752518, 1.57573626],
    (HARD, False): [0.3, 0.3, 0.41823557],
}


@pytest.mark.parametrize(("kind", "right"), RELEASED)
def test_the_released_reward_comes_out(kind: int, right: bool):
    n = f64([4, 10, 16])
    term = released_term(torch.full((3,), right), torch.full((3,), kind), n, torch.full_like(n, 10), 0.5)
    assert_close(float(right) + term, f64(RELEASED[kind, right]), atol=1e-7, rtol=0)


def test_the_papers_cost_comes_out():
    distance = f64([-6, 0, 6])
    got = [paper_cost(torch.full((3,), kind), distance).tolist() for kind in (EASY, MEDIUM, HARD)]
    assert got == [[0, 0, 6], [6, 0, 6], [6, 0, 0]]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_a_term_is_at_most_its_cap(alpha: float):
    n = torch.arange(200, dtype=torch.float64)
    for kind, scale in ((EASY, 1.0), (MEDIUM, 1.0), (HARD, 1.2)):
        for right in (True, False):
            term = released_term(
                torch.full((200,), right), torch.full((200,), kind), n, torch.full_like(n, 50), alpha
            )
            assert term.abs().max() <= alpha * scale


def test_easy_and_right_within_the_margin_is_not_punished():
    n = torch.arange(24, dtype=torch.float64)  # target 20, margin 3
    assert not released_term(
        torch.ones(24, dtype=torch.bool), torch.zeros(24, dtype=torch.int64), n, torch.full_like(n, 20), 0.5
    ).any()


def test_windows_are_those_of_the_example():
    entropy = f64([[0.1, 0.2, 2.0, 1.8, 0.9, 0.1, 0.1, 0.3]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    mean, complete = window_mean(entropy, mask, 4)
    assert_close(mean, f64([[1.025, 1.225, 1.2, 0.725, 0.35]]))
    assert complete.all()
    assert high_windows(entropy, mask, 4, 1.0).sum() == 3
    assert_close(row_quantile(entropy, mask, 0.95), f64([1.93]))


def test_a_released_window_lies_behind_its_token_and_may_equal_the_threshold():
    entropy = f64([[9.0, 1.0, 3.0, 2.0, 2.0, 0.0]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    # means of the two tokens after tokens 0 to 3: 2, 2.5, 2, 1; the 9 at the beginning is in no window
    assert high_windows(entropy, mask, 2, 2.0, "released").tolist() == [[True, True, True, False, False]]
    assert high_windows(entropy, mask, 2, 2.0).tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_released_thresholds_are_percentiles_over_all_tokens(window: int, quantile: float):
    inputs = step()
    got = released_thresholds(inputs["old_entropy"], inputs["mask"], window, quantile)
    for row, entropy in enumerate(inputs["old_entropy"]):
        assert got[row].item() == pytest.approx(
            percentile_of_row(entropy[inputs["mask"][row]].tolist(), window, quantile)
        )


def percentile_of_row(entropy: list[float], window: int, quantile: float) -> float:
    """Token by token: the mean of the next window; where too few tokens follow, the mean of the values
    collected so far.
    """
    collected: list[float] = []
    for position, value in enumerate(entropy):
        following = entropy[position + 1 : position + 1 + window]
        if len(following) == window:
            collected.append(float(np.mean(following)))
        else:
            collected.append(float(np.mean(collected)) if collected else value)
    return float(np.percentile(collected, 100 * quantile))


def test_another_speakers_tokens_are_in_no_released_window():
    entropy = f64([[5, 90, 1, 90, 3], [4, 90, 90, 90, 90]])
    mask = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    assert high_windows(entropy, mask, 2, 2.0, "released").sum(1).tolist() == [1, 0]
    # row 0: (1 + 3) / 2, and twice the mean of the values so far; row 1: its single token
    assert released_thresholds(entropy, mask, 2, 0.95).tolist() == [2, 4]


def test_windows_run_over_the_tokens_the_policy_wrote():
    # the masked-out 9s are another speaker's: windows of 2 are (1, 3) and (3, 5); a single token has none
    entropy = f64([[1, 9, 3, 9, 5], [4, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    mean, complete = window_mean(entropy, mask, 2)
    assert complete.tolist() == [[True, True, False, False], [False] * 4]
    assert mean[0, :2].tolist() == [2, 4]
    assert high_windows(entropy, mask, 6, 0.0).shape == (2, 0)


def test_difficulty_is_the_share_of_right_answers():
    # 2/3, 1/3, 0: thirds are not exact in floating point
    right = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 0]).bool()
    assert (
        difficulty(right, torch.tensor([7] * 3 + [8] * 3 + [9] * 3)).tolist()
        == [EASY] * 3 + [MEDIUM] * 3 + [HARD] * 3
    )


def step() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 13, (18, 1), generator=generator)
    return {
        "mask": torch.arange(12) < lengths,
        "old_entropy": torch.rand(18, 12, generator=generator, dtype=torch.float64),
    }


GROUP = torch.tensor([2, 5, 11] * 6)
REWARDS = f64([1, 0, 1] * 3 + [1, 0, 0] * 2 + [0, 1, 0])


def test_alpha_0_leaves_accuracy_alone():
    assert_close(ares(REWARDS, GROUP, **step(), alpha=0.0), group_norm(REWARDS, GROUP))
    assert not torch.allclose(ares(REWARDS, GROUP, **step()), group_norm(REWARDS, GROUP))


def test_the_papers_form_refuses_a_target_that_makes_it_do_nothing():
    with pytest.raises(ValueError, match=r"paper's form needs targets"):
        ares(REWARDS, GROUP, **step(), form="paper")
    with pytest.raises(ValueError, match=r"three numbers, .* got \[1.0\]"):
        ares(REWARDS, GROUP, **step(), form="paper", targets=[1.0])


def test_the_papers_form_never_touches_right_answers_rewards():
    # all groups all right: nothing is wrong, so rewards stay equal and advantages 0
    got = ares(torch.ones(18).double(), GROUP, **step(), form="paper", threshold=0.4, targets=[1.0, 1.0, 1.0])
    assert not got.any()


@pytest.mark.parametrize("form", ["released", "paper"])
def test_ungraded_and_empty_rows_change_nothing_for_the_others(form: str):
    inputs = step()
    inputs["mask"][3] = False
    rewards = REWARDS.clone()
    rewards[7] = math.nan
    kept = torch.tensor([row for row in range(18) if row not in (3, 7)])
    options = {"form": form, "targets": [1.0, 2.0, 3.0] if form == "paper" else None}
    got = ares(rewards, GROUP, **inputs, **options)  # type: ignore[arg-type]
    assert got[3] == 0 and got[7] == 0
    kept_inputs = {name: value[kept] for name, value in inputs.items()}
    rest = ares(rewards[kept], GROUP[kept], **kept_inputs, **options)  # type: ignore[arg-type]
    assert_close(got[kept], rest)


def test_the_order_of_rows_does_not_matter():
    inputs = step()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    got = ares(REWARDS, GROUP, **inputs)
    assert_close(
        ares(REWARDS[order], GROUP[order], **{name: value[order] for name, value in inputs.items()}),
        got[order],
    )


def test_a_step_without_a_complete_window_still_has_advantages():
    got = ares(
        f64([1, 0]),
        torch.zeros(2, dtype=torch.int64),
        mask=torch.ones(2, 2),
        old_entropy=torch.ones(2, 2).double(),
    )
    assert got[0] > 0 > got[1]
