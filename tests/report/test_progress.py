"""The step line on terminals of several widths and in a log file."""

import io
import math

import pytest
from rich.console import Console

from rltrain.report.progress import Progress, _count, _number, _power, _rate, _seconds, list_changes

METRICS = {
    "reward/mean": 0.4123,
    "reward/useful_groups": 0.625,
    "learner/entropy_mean": 0.391,
    "rollout/mismatch_abs": 2.13e-6,
    "learner/grad_norm": 0.52,
    "rollout/length_mean": 5.3,
    "rollout/finished_by_length": 0.02,
    "loss/total": 0.987654,
    "time/tokens_per_second": 17_812.0,
    "time/step": 0.5,
    "time/rollout": 0.21,
    "time/reward": 0.02,
    "time/annotate": 0.01,
    "time/update": 0.23,
    "time/sync": 0.03,
}
EVAL = {
    "eval/reward": 0.39,
    "eval/pass@8": 0.86,
    "eval/pass@8_low": 0.81,
    "eval/pass@8_high": 0.9,
    "eval/ungraded": 0.0,
    "time/eval": 1.0,
}


def shown(act, *, width: int = 80, terminal: bool = True, total: int = 200) -> list[str]:
    file = io.StringIO()
    act(Progress(total, Console(file=file, force_terminal=terminal, width=width, color_system=None)))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 100, 140, 200])
def test_every_line_fits_the_terminal_and_columns_end_where_their_header_ends(width):
    header, line = shown(lambda progress: progress.step(METRICS), width=width)
    assert len(line) == len(header) <= width
    ends = [
        i
        for i, (here, after) in enumerate(zip(header, header[1:] + " ", strict=True))
        if here != " " and after == " "
    ]
    assert all(line[end] != " " and line[end + 1 : end + 2] in (" ", "") for end in ends)


def test_eighty_columns_hold_what_the_issue_asks_for():
    header, line = shown(lambda progress: progress.step(METRICS))
    assert header.split() == [
        "step",
        "reward",
        "useful",
        "entropy",
        "|dlogp|",
        "grad",
        "tok/s",
        "time",
        "rollout",
        "update",
    ]
    assert line.split() == [
        "1/200",
        "0.412",
        "62%",
        "0.391",
        "2.1e-6",
        "0.520",
        "17.8k",
        "0.50s",
        "0.21s",
        "0.23s",
    ]


def test_wide_terminals_add_the_other_phases_and_the_time_left():
    header, line = shown(lambda progress: progress.step(METRICS), width=140)
    assert header.split()[-6:] == ["rollout", "grade", "annot", "update", "sync", "left"]
    assert line.split()[-1] == "100s"  # 199 steps to go at 0.5 s


def test_the_loss_is_not_on_the_line():
    assert not any(
        "0.98" in line or "loss" in line for line in shown(lambda progress: progress.step(METRICS), width=300)
    )


def test_the_header_comes_back_every_twenty_steps_and_when_the_columns_change():
    def forty_one(progress):
        for _ in range(41):
            progress.step(METRICS)

    headers = [i for i, line in enumerate(shown(forty_one)) if "reward" in line]
    assert headers == [0, 21, 42]

    def a_new_column(progress):
        progress.step({"reward/mean": 1.0})
        progress.step(METRICS)

    assert sum("reward" in line for line in shown(a_new_column)) == 2


@pytest.mark.parametrize("width", [60, 100])
def test_a_legend_explains_each_column_once_before_its_first_header(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    progress = Progress(200, console, legend=True)
    progress.step({"reward/mean": 1.0})
    progress.step(METRICS)
    for _ in range(20):
        progress.step(METRICS)
    lines = file.getvalue().splitlines()
    assert lines[0] == "reward: mean of the step" and lines[1].split() == ["step", "reward"]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("mean of the step") == 1 and text.count("groups whose rewards differ") == 1
    assert "sampling" in text or width == 60  # a column that is not shown is not explained
    log = io.StringIO()
    Progress(200, Console(file=log, width=width), legend=True).step(METRICS)
    assert log.getvalue().count("\n") == 1  # a file has no columns to explain


def test_a_missing_number_is_a_dash_and_keeps_the_columns():
    def one_missing(progress):
        progress.step(METRICS)
        progress.step({name: value for name, value in METRICS.items() if name != "rollout/mismatch_abs"})

    header, _, line = shown(one_missing)
    assert line[header.index("|dlogp|") + len("|dlogp|") - 1] == "-"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_says_why_nothing_was_learned(terminal):
    lines = shown(
        lambda progress: progress.step({**METRICS, "learner/grad_norm": 0.0}, "all groups equal"),
        terminal=terminal,
    )
    assert "nothing learned: all groups equal" in lines[-1]
    wide = shown(lambda progress: progress.step(METRICS, "lr 0"), width=200)
    assert len(wide) == 2 and wide[1].endswith("nothing learned: lr 0")


def test_a_log_file_gets_names_with_every_number_and_no_header():
    (line,) = shown(lambda progress: progress.step(METRICS), terminal=False, width=80)
    assert line.startswith(
        "step   1/200  reward 0.412  useful 62%  entropy 0.391  |dlogp| 2.1e-6  grad 0.520"
    )
    assert line.endswith(
        "time 0.50s  rollout 0.21s  grade 0.02s  annot 0.01s  update 0.23s  sync 0.03s  left 100s"
    )


def test_evaluations_stand_apart_with_their_interval_first():
    (line,) = shown(lambda progress: progress.evaluation(EVAL))
    assert line == "  0/200  eval  pass@8 0.860 [0.810, 0.900]  reward 0.390"
    many = EVAL | {f"eval/pass@{k}": 0.5 for k in range(9, 30)}
    assert len(shown(lambda progress: progress.evaluation(many))[0]) <= 80  # what does not fit is in the file
    (line,) = shown(lambda progress: progress.evaluation(many), terminal=False)
    assert "pass@29 0.500" in line


def test_an_interval_of_nan_is_left_out():
    nan = {"eval/pass@1": 0.5, "eval/pass@1_low": math.nan, "eval/pass@1_high": math.nan}
    assert shown(lambda progress: progress.evaluation(nan)) == ["  0/200  eval  pass@1 0.500"]


def test_brackets_in_messages_are_text_and_not_markup():
    assert shown(lambda progress: progress.message("see [bold]runs/x[/bold] [0.1, 0.2]")) == [
        "see [bold]runs/x[/bold] [0.1, 0.2]"
    ]


def test_a_resumed_run_counts_on():
    file = io.StringIO()
    progress = Progress(200, Console(file=file, width=80), start=120)
    progress.step(METRICS)
    assert "step 121/200" in file.getvalue() and "left 40s" in file.getvalue()  # 79 steps at 0.5 s: 39.5


def test_nan_is_shown_as_nan():
    assert (
        "nan" in shown(lambda progress: progress.step({**METRICS, "learner/grad_norm": math.nan}))[1].split()
    )


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (_number, 0.0, "0.000"), (_number, 0.0004, "4.0e-4"), (_number, -12.3456, "-12.35"),
        (_number, 999.6, "1.0e3"), (_number, 123.45, "123.5"),
        (_power, 0.0, "0"), (_power, 2.13e-6, "2.1e-6"), (_power, 31_000.0, "3.1e4"),
        (_count, 5.3, "5"), (_count, 9_999.6, "10.0k"), (_count, 123_456.0, "123k"),
        (_count, 2_400_000.0, "2.4M"),
        (_seconds, 0.004, "0.00s"), (_seconds, 9.996, "10s"), (_seconds, 600.0, "10min"),
        (_seconds, 7_200.0, "2.0h"),
    ],
)  # fmt: skip
def test_numbers_stay_short_and_a_small_one_never_looks_like_zero(show, value, text):
    assert show(value) == text


def test_the_end_of_a_run_says_before_and_after() -> None:
    def measured(value: float) -> dict[str, float]:
        return {
            "eval/pass@1": value,
            "eval/pass@1_low": value - 0.1,
            "eval/pass@1_high": value + 0.1,
            "eval/n": 1,
        }

    lines = list_changes([measured(0.3), measured(0.5), measured(0.8)])
    assert lines == ["pass@1       0.300 [0.200, 0.400] -> 0.800 [0.700, 0.900]"]
    assert list_changes([measured(0.3)]) == []


def test_a_sample_is_one_line_of_a_terminal_and_nothing_in_a_log() -> None:
    shown = io.StringIO()
    progress = Progress(10, Console(file=shown, force_terminal=True, width=80, color_system=None))
    progress.sample("a long question " * 20 + "2 + 2 =", "4\x1b[2J\nindeed " + "and so on " * 30, 1.0)
    (line,) = shown.getvalue().splitlines()
    assert "2 + 2 = -> 4 [2J indeed" in line and line.endswith("...  reward 1.000")
    assert len(line) <= 80
    logged = io.StringIO()
    Progress(10, Console(file=logged, width=80)).sample("p", "c", None)
    assert logged.getvalue() == ""


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.50"), (0.994, "0.99"), (0.996, "1.0"), (9.94, "9.9"), (9.96, "10"), (0.0, "0")],
)
def test_a_rate_below_ten_has_digits_behind_the_point(rate, text):
    assert _rate(rate) == text


def test_half_an_example_a_second_is_not_shown_as_none():
    header, line = shown(
        lambda progress: progress.step(
            {"loss/accuracy": 0.5, "time/examples_per_second": 0.5, "time/step": 2.0}
        )
    )
    assert dict(zip(header.split(), line.split(), strict=True))["ex/s"] == "0.50"


@pytest.mark.parametrize(("others", "text"), [({"reward/correct": 0.4}, ">1"), ({}, "1.272")])
def test_a_ceiling_that_no_share_reaches_is_shown_as_such(others, text):
    header, line = shown(
        lambda progress: progress.step({**METRICS, "law/ceiling": 1.272, **others}), width=120
    )
    assert dict(zip(header.split(), line.split(), strict=True))["ceil"] == text
