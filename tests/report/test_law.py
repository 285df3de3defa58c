"""The law R = -a exp(H) + b: the fit, how well its intervals cover, and what a run hears of it."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from rltrain.report.law import Law, fit_law, student_quantile
from rltrain.report.names import check_names
from rltrain.report.progress import Progress

ENTROPY = [0.6, 0.4, 0.3, 0.2, 0.1]
REWARD = [0.20, 0.295, 0.33, 0.37, 0.395]


def test_the_worked_example() -> None:
    fit = fit_law(ENTROPY, REWARD)
    assert fit is not None
    assert (fit.a.value, fit.b.value) == pytest.approx((0.27445133281377826, 0.70170360101728))
    assert fit.ceiling.value == pytest.approx(0.42725226820350176)
    assert fit.reward_at(0.05) == pytest.approx(0.41318084746827827)
    assert fit.slope(0.2) == pytest.approx(-0.3352156148794835)


def test_the_fit_is_numpys_least_squares() -> None:
    generator = np.random.default_rng(0)
    entropy = generator.uniform(0.05, 2.0, 40)
    reward = 0.8 - 0.1 * np.exp(entropy) + generator.normal(0, 0.05, 40)
    (a, b), *_ = np.linalg.lstsq(np.stack([-np.exp(entropy), np.ones(40)], 1), reward, rcond=None)
    fit = fit_law(entropy.tolist(), reward.tolist())
    assert fit is not None and (fit.a.value, fit.b.value) == pytest.approx((a, b))


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (10, 2.2281389), (30, 2.0422725), (1e6, 1.9599664)],
)
def test_students_quantile_is_the_tables(freedom: float, expected: float) -> None:
    assert student_quantile(freedom) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.92), (0.5, 0.85)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(memory: float, least: float) -> None:
    # 400 runs of 60 steps on one curve with noise, white or remembering half of itself; plain intervals would
    # cover 0.74 of the latter
    generator = np.random.default_rng(1)
    inside = 0
    entropy = 1.2 * np.exp(-np.arange(60) / 25)
    for _ in range(400):
        noise = np.zeros(60)
        for step, draw in enumerate(generator.normal(0, 0.02, 60)):
            noise[step] = memory * noise[step - 1] + draw
        fit = fit_law(entropy.tolist(), (0.7 - 0.12 * np.exp(entropy) + noise).tolist())
        assert fit is not None
        inside += fit.ceiling.low <= 0.58 <= fit.ceiling.high
    assert least <= inside / 400 <= 0.99


def test_points_on_the_curve_leave_no_doubt() -> None:
    fit = fit_law(ENTROPY, [0.7 - 0.2 * math.exp(entropy) for entropy in ENTROPY])
    assert fit is not None
    assert fit.ceiling.high - fit.ceiling.low < 1e-12 and fit.a.value == pytest.approx(0.2)


@pytest.mark.parametrize("entropy", [[], [0.5, 0.4], [0.5, 0.5, 0.5, 0.5]])
def test_too_few_points_or_one_entropy_fit_nothing(entropy: list[float]) -> None:
    assert fit_law(entropy, [0.1] * len(entropy)) is None


def run(
    law: Law, steps: int, *, start: float = 1.0, rate: float = 0.1, first: int = 0
) -> list[dict[str, float]]:
    """Entropy falls exponentially and the reward follows the law with a = 0.2, b = 0.8, and a small
    wobble.
    """
    metrics = []
    for step in range(first, first + steps):
        entropy = start * math.exp(-rate * step)
        reward = 0.8 - 0.2 * math.exp(entropy) + 1e-3 * math.sin(7 * step)
        metrics.append(
            law.step({"learner/entropy_mean": entropy, "reward/correct": reward, "reward/mean": -5.0})
        )
    return metrics


def test_a_run_hears_of_its_ceiling_before_it_gets_there() -> None:
    metrics = run(Law(), 20)
    assert metrics[6] == {} and "law/ceiling" in metrics[7]  # the eighth point
    check_names(metrics[-1])
    assert metrics[-1]["law/ceiling_low"] < 0.6 < metrics[-1]["law/ceiling_high"]
    assert metrics[-1]["law/ceiling"] == pytest.approx(0.6, abs=0.005)
    assert metrics[-1]["law/exhausted"] == 0.0


def test_exhausted_is_said_once_and_stays_in_the_metrics() -> None:
    # exp(H) - 1 falls from about 1.5 to a twentieth of it at H = 0.07: step 27 of a decay of 0.1
    law = Law()
    reports = []
    for step in range(60):
        (metrics,) = run(law, 1, first=step)
        reports.append((law.message(), metrics.get("law/exhausted")))
    messages = [(step, text) for step, (text, _) in enumerate(reports) if text]
    ((when, text),) = messages
    assert 24 <= when <= 32 and "the reward ends near 0.60" in text
    assert all(flag == 1.0 for _, flag in reports[when:])


def test_entropy_that_rewards_do_not_fall_with_is_not_exhausted() -> None:
    law = Law()
    for step in range(60):
        law.step(
            {"learner/entropy_mean": math.exp(-0.1 * step), "reward/mean": 0.5 + 0.1 * math.sin(5 * step)}
        )
    assert not law.is_exhausted() and law.message() is None


def test_held_out_results_are_paired_with_the_entropy_of_the_same_weights() -> None:
    # an evaluation is of the weights that the next step samples from; one without pass@1 pairs with nothing
    law = Law()
    law.evaluation({"eval/pass@1": 0.2})
    law.step({"learner/entropy_mean": 0.9, "reward/mean": 0.1})
    law.step({"learner/entropy_mean": 0.8, "reward/mean": 0.1})
    law.evaluation({"eval/pass@1": 0.3})
    law.evaluation({"eval/reward": 0.3})
    law.step({"learner/entropy_mean": 0.7, "reward/mean": 0.1})
    assert law.points["eval"] == [(0.9, 0.2)]
    assert law.points["train"] == [(0.9, 0.1), (0.8, 0.1), (0.7, 0.1)]


def test_a_step_without_rewards_is_no_point() -> None:
    law = Law()
    law.step({"learner/entropy_mean": 0.9, "reward/mean": math.nan})
    assert law.points["train"] == []


def test_the_step_line_shows_the_ceiling_on_eighty_columns() -> None:
    file = io.StringIO()
    names = (
        "reward/mean",
        "reward/useful_groups",
        "learner/entropy_mean",
        "rollout/mismatch_abs",
        "learner/grad_norm",
    )
    metrics = dict.fromkeys((*names, "time/tokens_per_second", "time/step"), 0.5) | {"law/ceiling": 0.913}
    Progress(9, Console(file=file, force_terminal=True, width=80, color_system=None)).step(metrics)
    header, line = file.getvalue().splitlines()
    assert dict(zip(header.split(), line.split(), strict=True))["ceil"] == "0.913"


def test_a_resumed_law_goes_on_as_if_never_stopped() -> None:
    uninterrupted = Law()
    uninterrupted.evaluation({"eval/pass@1": 0.1})
    expected = run(uninterrupted, 40)
    stopped = Law()
    stopped.evaluation({"eval/pass@1": 0.1})
    run(stopped, 20)
    resumed = Law()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, 20, first=20) == expected[20:]
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_a_ceiling_above_the_largest_share_is_told() -> None:
    """A line through steep points ends above 1, which no share of right completions is."""

    def announce(name: str) -> str:
        law = Law()
        for step in range(60):
            entropy = 0.9 * math.exp(-0.1 * step)
            reward = 1.6 - 0.5 * math.exp(entropy)
            law.step({"learner/entropy_mean": entropy, "reward/mean": reward, name: reward})
            if (message := law.message()) is not None:
                return message
        raise AssertionError("entropy was never exhausted")

    assert "0.100 above the largest possible share, so the line bends before" in announce("reward/correct")
    assert "largest possible" not in announce("reward/mean")  # whose range is not known
