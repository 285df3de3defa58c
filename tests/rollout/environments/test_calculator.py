"""The calculator environment: what is a call, and what the answers are."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.rollout.environments import Step, Task
from rltrain.rollout.environments.calculator import Calculator, evaluate


def played(*texts: str) -> list[Step]:
    calculator = Calculator()
    assert calculator.reset(Task("a", "12*7="), 0) is None  # the task's own prompt stands
    return [calculator.step(text) for text in texts]


def test_a_call_is_answered_and_anything_else_ends_the_episode() -> None:
    first, last = played("<<12*7=", "84")
    assert (first.observation, first.done) == ("84", False)
    assert last.done and last.parts == {"calls": 1.0, "failed_calls": 0.0}


@pytest.mark.parametrize("text", ["I compute <<48/2=", "<<48/2=>>", "<<1=1>> and <<48/2=\n"])
def test_a_call_is_what_the_turn_ends_with(text: str) -> None:
    assert played(text)[0].observation == "24"


@pytest.mark.parametrize("text", ["48/2=", "<<48/2", "<<48/2= 24", "84", "", "<<48/2=24>>"])
def test_what_is_no_call_is_an_answer(text: str) -> None:
    assert played(text)[0].done


def test_failed_calls_are_told_and_counted_per_episode() -> None:
    calculator = Calculator()
    calculator.reset(Task("a", ""), 0)
    assert calculator.step("<<1/0=") == Step(
        "error: division by zero", parts={"calls": 1.0, "failed_calls": 1.0}
    )
    calculator.reset(Task("a", ""), 0)
    assert calculator.step("5").parts == {"calls": 0.0, "failed_calls": 0.0}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("0.1+0.2", "0.3"),  # floating point would say 0.30000000000000004
        ("1/3", "0.333333"),
        ("-2/3", "-0.666667"),
        ("1/3*3", "1"),
        ("-5+2*(3-1)", "-1"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("99999999999*99999999999", "9999999999800000000001"),
        ("0.0000001/2", "0"),
    ],
)
def test_values_are_exact(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "1+",
        "2**9",
        "abs(1)",
        "1e9",
        "0x10",
        "1_0",
        "True",
        "a",
        "[1]",
        "1 if 1 else 2",
        "9" * 61,
        "(" * 300,
        "1+" * 120 + "1",
    ],
)
def test_what_is_no_arithmetic_is_refused_at_once(expression: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        evaluate(expression)


def test_numbers_that_grow_out_of_bounds_stop_there() -> None:
    with pytest.raises(ValueError, match="digits"):
        evaluate("*".join(["9999999999"] * 7))  # 70 digits


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.sampled_from("+-*"))
def test_integers_agree_with_python(left: int, right: int, operation: str) -> None:
    expected = {"+": left + right, "-": left - right, "*": left * right}[operation]
    assert evaluate(f"{left}{operation}({right})") == str(expected)


@given(st.integers(-(10**4), 10**4), st.integers(1, 10**4))
def test_quotients_are_right_to_six_decimals(left: int, right: int) -> None:
    assert abs(Fraction(evaluate(f"{left}/{right}")) - Fraction(left, right)) <= Fraction(1, 2 * 10**6)
