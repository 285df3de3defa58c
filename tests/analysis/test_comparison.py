"""Curves of runs, their table, figure and page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rltrain.analysis.comparison import (
    Comparison,
    figure,
    markdown,
    paired_seeds,
    reading_notes,
    table,
)
from rltrain.analysis.curves import Curves, Spread, range_of, student_mean
from rltrain.analysis.pages.comparison_page import comparison_page
from rltrain.errors import UserError
from rltrain.report.sinks import JsonLines


def run(
    folder: Path, accuracy: list[float], entropy: list[float], touched_share: float | None = None
) -> Curves:
    """A run of as many steps as entropies, evaluated at its start and its end."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "time/step": 30.0,
            "learner/entropy_mean": value,
            "reward/mean": 0.7 - 0.3 * math.exp(value),
        }
        | ({} if touched_share is None else {"control/clip_cov_touched": touched_share})
        for step, value in enumerate(entropy, start=1)
    ]
    if len(accuracy) < 3:
        steps = [0, *([len(entropy)] if len(accuracy) > 1 else [])]
    else:
        steps = list(range(len(accuracy)))
    evals = [
        {
            "step": step,
            "eval/pass@1": value,
            "eval/pass@1_low": value - 0.1,
            "eval/pass@1_high": value + 0.1,
            "eval/pass@8": value + 0.2,
        }
        for step, value in zip(steps, accuracy, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + evals))
    return Curves.read(folder)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    plain = [
        run(tmp_path / f"grpo-{seed}", [0.4, 0.6 + seed / 10], [1.0, 0.8, 0.5, 0.2]) for seed in range(2)
    ]
    other = [
        run(tmp_path / f"cov-{seed}", [0.4, 0.7 + seed / 10], [1.0, 0.9, 0.8, 0.7], touched_share=0.02)
        for seed in range(2)
    ]
    return Comparison("grpo and <cov>", ("profile tiny_cpu",), {"grpo": plain, "cov": other})


def test_students_interval_by_hand() -> None:
    # 1 and 3: mean 2, standard deviation sqrt(2), over sqrt(2): 1; t with one degree of freedom 12.706.
    assert student_mean([1.0, 3.0]) == Spread(
        2.0, pytest.approx(2 - 12.7062, abs=1e-4), pytest.approx(2 + 12.7062, abs=1e-4)
    )
    assert math.isnan(student_mean([5.0]).low)
    assert student_mean([1.0] * 40) == Spread(1.0, 1.0, 1.0)


def test_a_run_says_how_it_ended_and_what_was_best(tmp_path: Path) -> None:
    curves = run(tmp_path / "a", [0.4, 0.9, 0.5], [2.0] * 9 + [0.5])
    assert curves.final("eval/pass@1") == Spread(0.5, pytest.approx(0.4), pytest.approx(0.6))
    assert curves.best("eval/pass@1") == Spread(0.9, 0.8, 1.0)
    assert curves.entropy_kept == 0.25  # a tenth of ten steps is one
    assert curves.minutes == 5.0 and curves.final("eval/accuracy") is None


def test_entropy_is_of_the_first_and_the_last_tenth_of_the_steps(tmp_path: Path) -> None:
    # twenty steps: (2 + 4) / 2 at the start, (1 + 2) / 2 at the end
    assert run(tmp_path / "a", [0.4, 0.5], [2.0, 4.0, *[9.0] * 16, 1.0, 2.0]).entropy_kept == 0.5


def test_what_a_loss_clips_on_either_side_is_touched_too_and_the_ceiling_is_the_last_fit(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    lines = [
        {"step": 1, "time/step": 1.0, "loss/clip_low": 0.02, "loss/clip_high": 0.01, "law/ceiling": 0.5},
        {"step": 2, "time/step": 1.0, "loss/clip_low": 0.04, "loss/clip_high": 0.01, "law/ceiling": 0.8},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = Curves.read(folder)
    ceiling = curves.ceiling()
    assert curves.touched_shares() == {"clip": pytest.approx(0.04)}  # 0.03 and 0.01
    assert ceiling is not None and ceiling.value == 0.8


def test_numbers_that_are_not_finite_are_left_out_of_curves_and_counted(tmp_path: Path) -> None:
    # the interval over a single held-out prompt is not finite, and a step's number may not be
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step, kl, entropy in ((1, 0.1, 1.0), (2, math.nan, math.inf), (3, 0.3, 0.5)):
        lines.log(
            step, {"time/step": 1.0, "loss/kl": kl, "learner/entropy_mean": entropy, "reward/mean": 0.5}
        )
    lines.log(
        3,
        {
            "eval/pass@1": 1.0,
            "eval/pass@1_low": math.nan,
            "eval/pass@1_high": math.nan,
            "eval/loss": math.nan,
        },
    )
    lines.close()
    curves = Curves.read(tmp_path)
    final, loss = curves.final("eval/pass@1"), curves.final("eval/loss")
    assert final is not None and final.value == 1.0 and math.isnan(final.low) and str(final) == "1.000"
    assert loss is not None and math.isnan(loss.value) and curves.best("eval/loss") is None
    assert curves.series("loss/kl") == ([1, 3], [0.1, 0.3]) and curves.entropy_kept == 0.5
    assert curves.law_points() == [(1.0, 0.5), (0.5, 0.5)]
    assert curves.nonfinite == {
        "loss/kl": 1,
        "learner/entropy_mean": 1,
        "eval/pass@1_low": 1,
        "eval/pass@1_high": 1,
        "eval/loss": 1,
    }
    comparison = Comparison("one prompt", (), {"a": [curves], "b": [curves]})
    assert dict(zip(*table(comparison)[:2], strict=True))["pass@1 at the end"] == "1.000"
    assert figure(comparison).startswith(b"\x89PNG")


def test_runs_of_both_kinds_have_a_table_each(tmp_path: Path) -> None:
    sampled = run(tmp_path / "a", [0.4, 0.5], [1.0, 0.5])
    sampled.steps[0]["rollout/completions"] = 8.0
    judged = judged_run(tmp_path / "b", 0.6, [0.5, 0.7], 0.4)
    parts = Comparison("both", (), {"grpo": [sampled], "dpo": [judged]}).parts
    assert [list(part.methods) for part in parts] == [["grpo"], ["dpo"]]
    assert [part.measures[0] for part in parts] == ["eval/pass@1", "eval/accuracy"]
    assert "less grpo's" not in markdown(Comparison("both", (), {"grpo": [sampled], "dpo": [judged]}))


def test_differences_are_paired_by_seed(comparison: Comparison) -> None:
    # Both seeds differ by 0.1, although the runs of a method differ among themselves as much.
    difference = paired_seeds(comparison.methods["cov"], comparison.methods["grpo"], "eval/pass@1")
    assert difference is not None and (difference.value, difference.low, difference.high) == pytest.approx(
        (0.1, 0.1, 0.1)
    )
    assert paired_seeds(comparison.methods["cov"][:1], comparison.methods["grpo"], "eval/pass@1") is None


def test_the_table_has_a_row_for_each_method(comparison: Comparison) -> None:
    header, grpo, cov = table(comparison)
    cells = dict(zip(header, cov, strict=True))
    assert cells["method"] == "cov" and cells["seeds"] == "2" and cells["tokens touched"] == "clip_cov 2.00%"
    assert (
        cells["entropy at the end / start"] == "0.700 [0.700, 0.700]"
        and cells["pass@1 less grpo's"] == "0.100 [0.100, 0.100]"
    )
    assert cells["that less grpo's"] == "0.500 [0.500, 0.500]"  # grpo keeps 0.2
    assert cells["pass@8 at the end"].startswith("0.950") and cells["minutes"] == "4.0"
    assert dict(zip(header, grpo, strict=True))["pass@1 less grpo's"] == "-"
    assert markdown(comparison).count("\n") == 6


def judged_run(folder: Path, accuracy: float, accuracies: list[float], gap: float) -> Curves:
    """A run over judged examples, evaluated before and after; two steps make a pass."""
    folder.mkdir(parents=True)
    steps = [
        {
            "step": step,
            "time/step": 30.0,
            "learner/epoch": step / 2,
            "loss/accuracy": value,
            "loss/preference": 0.5,
        }
        for step, value in enumerate(accuracies, start=1)
    ]
    evals = [
        {
            "step": step,
            "eval/accuracy": share,
            "eval/margin": 0.3,
            "eval/entropy": entropy,
            "eval/loss": 0.5 + gap,
            "eval/ece": 0.1,
        }
        for step, share, entropy in ((0, 0.5, 2.0), (len(accuracies), accuracy, 1.5))
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [evals[0], *steps, evals[1]])
    )
    return Curves.read(folder)


def test_runs_over_judged_examples_show_calibration_entropy_and_what_they_learn_by_heart(
    tmp_path: Path,
) -> None:
    plain = [judged_run(tmp_path / f"dpo-{seed}", 0.6, [0.5, 0.7, 0.9, 1.0], 0.4) for seed in range(2)]
    soft = [judged_run(tmp_path / f"mmpo-{seed}", 0.7, [0.5, 0.5, 0.6, 0.6], 0.1) for seed in range(2)]
    both = Comparison("graded", (), {"dpo": plain, "mmpo": soft})
    header, first, second = (dict(zip(table(both)[0], row, strict=True)) for row in table(both))
    assert "entropy at its best" not in header and header["accuracy at its best"] == "accuracy at its best"
    assert first["accuracy in the last pass"] == "0.950 [0.950, 0.950]"  # of steps 3 and 4
    assert second["held-out loss less the last pass's"] == "0.100 [0.100, 0.100]"
    assert (
        second["accuracy less dpo's"] == "0.100 [0.100, 0.100]"
        and second["ece less dpo's"] == "0.000 [0.000, 0.000]"
    )
    assert second["entropy at the end / start"] == "0.750 [0.750, 0.750]"
    assert figure(both).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "holds no metrics.jsonl"), ("", "no training step"), ('{"step": 1}\n{"st', "line 2 is not JSON")],
)
def test_folders_without_a_run_are_refused(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        Curves.read(tmp_path)


def test_an_interval_over_seeds_of_a_share_stays_within_its_range(tmp_path: Path) -> None:
    """Student's interval of 0.9 and 1.0 goes from 0.31 to 1.59."""
    assert range_of("eval/pass@8") == (0.0, 1.0) and range_of("eval/margin") == (-math.inf, math.inf)
    runs = [run(tmp_path / f"a-{seed}", [0.4, 0.9 + seed / 10], [1.0, 0.5]) for seed in range(2)]
    others = [run(tmp_path / f"b-{seed}", [0.4, seed / 10], [1.0, 0.5]) for seed in range(2)]
    rows = table(Comparison("t", (), {"a": runs, "b": others}))
    column = rows[0].index("pass@1 at the end")
    assert [row[column] for row in rows[1:]] == ["0.950 [0.315, 1.000]", "0.050 [0.000, 0.685]"]
    steep = [run(tmp_path / f"c-{seed}", [0.4, 0.1 * seed + 0.8], [1.0, 0.5]) for seed in range(2)]
    low = [run(tmp_path / f"d-{seed}", [0.4, 0.1 - 0.1 * seed], [1.0, 0.5]) for seed in range(2)]
    difference = paired_seeds(low, steep, "eval/pass@1")
    assert difference is not None and (difference.low, round(difference.value, 3)) == (-1.0, -0.8)


def test_methods_with_equal_curves_are_one_curve_and_are_named(tmp_path: Path) -> None:
    runs = {name: [run(tmp_path / name, [0.4, 0.6], [1.0, 0.8, 0.5])] for name in ("grpo", "same")}
    runs["other"] = [run(tmp_path / "other", [0.4, 0.6], [1.0, 0.9, 0.7])]
    comparison = Comparison("t", (), runs)
    first, *others = reading_notes(comparison)
    assert first.startswith("grpo and same are equal at every step in training reward, policy entropy, nats,")
    assert all("held-out" in note and "training reward" not in note for note in others)
    assert f"- {first}" in markdown(comparison)
    page = comparison_page(comparison, tmp_path)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (reward,) = (chart for chart in data["charts"] if chart["title"] == "training reward")
    assert [line["label"] for line in reward["lines"]] == ["grpo, same", "other"]


def test_a_laws_ceiling_above_the_largest_share_is_noted(tmp_path: Path) -> None:
    runs = run(tmp_path / "a", [0.4, 0.6], [1.0, 0.8])
    steps = tuple({**line, "reward/correct": 0.9, "law/ceiling": 1.2} for line in runs.steps)
    (note,) = reading_notes(Comparison("t", (), {"a": [Curves(steps, runs.evals)]}))
    assert note.startswith("the law's ceiling of a is 1.200, and no share is above 1")
    unknown = tuple({**line, "law/ceiling": 1.2} for line in runs.steps)
    assert reading_notes(Comparison("t", (), {"a": [Curves(unknown, runs.evals)]})) == []
