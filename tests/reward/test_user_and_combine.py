"""The user's own file, names, and the weighted sum."""

import sys
from pathlib import Path

import pytest

from rltrain.reward.combine import combine, distinct_labels
from rltrain.reward.resolve import RewardCall, resolve
from rltrain.reward.score import RewardInputs, Score
from rltrain.reward.user import load_user_function

GRADERS = Path(__file__).with_name("graders.py")


def inputs(*completions: str, **columns: object) -> RewardInputs:
    return RewardInputs("p", completions, (1,) * len(completions), ("stop",) * len(completions), columns)


def test_trls_form_gets_columns_as_lists_and_may_leave_ungraded():
    grader = resolve(RewardCall(f"{GRADERS}:trl_form", 1.0, {}))
    assert grader(inputs("7", "8", answer="7", level=2)) == [Score(1.0), Score(0.0, ungraded="none")]
    assert grader.label == "trl_form"
    with pytest.raises(
        ValueError, match=r"trl_form needs answer, but the row has no such column; its columns are: level"
    ):
        grader(inputs("7", level=2))


def test_our_form_gets_its_hyperparameters():
    assert resolve(RewardCall(f"{GRADERS}:scaled", 1.0, {"scale": 2.5}))(inputs("a", "b")) == [
        Score(2.5),
        Score(2.5),
    ]
    assert resolve(RewardCall(f"{GRADERS}:together", 1.0, {})).scope == "group"


@pytest.mark.parametrize(
    ("spec", "hp", "said"),
    [
        ("nowhere.py:f", {}, r"there is no file .*nowhere\.py"),
        (f"{GRADERS}:nothing", {}, r"has no function 'nothing'; its functions are: .*trl_form"),
        (f"{GRADERS}:NOT_A_FUNCTION", {}, "must be a function, got 3"),
        (
            f"{GRADERS}:no_form",
            {},
            r"no_form\(first, second\) cannot be called as f\(inputs\): "
            "missing a required argument: 'second'",
        ),
        (f"{GRADERS}:scaled", {}, "missing a required argument: 'scale'"),
        (f"{GRADERS}:alone", {"scale": 1.0}, "unexpected keyword argument 'scale'"),
    ],
)
def test_a_reward_file_that_will_not_do_says_why(spec, hp, said):
    with pytest.raises(ValueError, match=said):
        load_user_function(spec, hp)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(2)", "SystemExit: 2"),
    ],
)
def test_a_file_that_does_not_import_shows_its_own_error(tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=rf"mine\.py does not import: {said}"):
        load_user_function(f"{tmp_path}/mine.py:f", {})


def test_a_reward_file_may_import_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text("BONUS = 3.0")
    (tmp_path / "mine.py").write_text(
        "from neighbour_of_mine import BONUS\ndef f(completions, **columns):\n    return [BONUS for _ in "
        "completions]"
    )
    assert resolve(RewardCall(f"{tmp_path}/mine.py:f", 1.0, {}))(inputs("a")) == [Score(3.0)]


def test_names_resolve_with_their_hyperparameters_and_unknown_ones_list_the_known():
    assert resolve(RewardCall("exact", 1.0, {"correct": 2.0}))(inputs("a", "b", answer="a"))[0].value == 2.0
    with pytest.raises(
        ValueError,
        match=r"no reward is called 'mathanswer'; choose from characters, choice, .*format, .*math_answer",
    ):
        resolve(RewardCall("mathanswer", 1.0, {}))


def test_the_sum_is_weighted_and_keeps_every_part():
    # 2 * 1 + 0.5 * (-0.25) = 1.875
    total = combine(
        ["math_answer", "length"],
        [2.0, 0.5],
        [Score(1.0, {"correct": 1.0}), Score(-0.25, {"over_length": 1.0})],
    )
    assert total == Score(
        1.875,
        {
            "math_answer": 1.0,
            "math_answer/correct": 1.0,
            "length": -0.25,
            "length/over_length": 1.0,
            "correct": 1.0,
        },
    )


def test_one_ungraded_function_leaves_the_completion_ungraded():
    scores = [Score(1.0, {"correct": 1.0}), Score(0.0, ungraded="timeout")]
    assert combine(["math_answer", "mine"], [1.0, 1.0], scores) == Score(0.0, ungraded="mine/timeout")
    assert combine(["mine"], [1.0], scores[1:]) == Score(0.0, ungraded="timeout")


def test_two_functions_of_one_name_are_told_apart():
    assert distinct_labels(["format", "length", "format", "format"]) == [
        "format",
        "length",
        "format#2",
        "format#3",
    ]
