"""Labels of chains of sums against a second way to compute them, and the problems' splits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import ModuleType

import pytest

from support.scripts import script


@pytest.fixture(scope="module")
def task(tiny_models: ModuleType) -> Iterator[ModuleType]:
    """scripts/make_step_task.py as a module; beside it lies the one that it takes parts from."""
    yield script("make_step_task")


PROMPT = "37+58+46="
RIGHT = ["37+58=95", "95+46=141", "A:141"]


def test_the_right_solution_has_no_wrong_step(task: ModuleType):
    assert task.solution(PROMPT) == RIGHT
    assert task.first_error(PROMPT, RIGHT) is None
    assert task.right_steps(PROMPT, RIGHT) == [True] * 3


@pytest.mark.parametrize(
    ("steps", "first", "right"),
    [
        (
            ["37+58=94", "94+46=140", "A:140"],
            0,
            [False, True, True],
        ),  # a wrong sum, and nothing wrong after it
        (["37+58=95", "95+46=151", "A:151"], 1, [True, False, True]),
        (["37+58=95", "95+46=141", "A:414"], 2, [True, True, False]),
        (["37+58=95", "94+46=140", "A:140"], 1, [True, False, True]),  # goes on from something else
        (["37+58=95", "95+48=143", "A:143"], 1, [True, False, True]),  # takes another number
        (
            ["37+58=94", "94+46=141", "A:141"],
            0,
            [False, False, True],
        ),  # two errors that cancel: right answer, wrong step
        (["37+58=95", "nonsense", "A:95"], 1, [True, False, True]),
        (["37+58=95", "95+46=141"], 1, [True, True]),  # stops too early: the last
        (["37+58=95", "A:95"], 1, [True, False]),
        ([*RIGHT, "A:141"], 3, [True, True, True, False]),  # goes on too long
    ],
)
def test_wrong_solutions_by_hand(task: ModuleType, steps: list[str], first: int, right: list[bool]):
    assert task.first_error(PROMPT, steps) == first
    assert task.right_steps(PROMPT, steps) == right


def test_planted_wrong_sums_are_found_where_they_were_planted(task: ModuleType):
    # an independent solver that errs at given steps: the first of them is the first wrong step, and exactly
    # they are wrong by themselves
    draw = random.Random(0)
    for problem in task.problems("dev", 50):
        total, *others = [int(term) for term in problem["prompt"][:-1].split("+")]
        planted = {index for index in range(len(others)) if draw.random() < 0.3}
        lines: list[str] = []
        for index, number in enumerate(others):
            stated = total + number + (index in planted)
            lines.append(f"{total:02}+{number}={stated:02}")
            total = stated
        steps = task.steps_of("\n".join([*lines, f"A:{total:02}"]))
        assert task.first_error(problem["prompt"], steps) == (min(planted) if planted else None)
        assert task.right_steps(problem["prompt"], steps) == [
            index not in planted for index in range(len(others) + 1)
        ]
        assert (problem["answer"] == str(total)) == (not planted)


def test_no_problem_is_in_two_splits_and_none_comes_twice(task: ModuleType):
    sets = [
        [problem["prompt"] for problem in task.problems(split, 300)]
        for split in ("train", "dev", "test", "warm up")
    ]
    flat = [prompt for prompts in sets for prompt in prompts]
    assert len(set(flat)) == len(flat) == 1200
    assert {prompt.count("+") + 1 for prompt in flat} == {6}
    assert [problem["prompt"] for problem in task.problems("dev", 300)] == sets[1]


def test_rows_say_what_is_wrong(task: ModuleType):
    problem = {"prompt": PROMPT, "problem": 7}
    wrong = "37+58=94\n94+46=140\nA:140"
    rows = [
        task.judged_row(problem, text, label, text[-3:])
        for text, label in (("\n".join(RIGHT), True), (wrong, False))
    ]
    assert rows[0] == {
        **{"prompt": PROMPT, "problem": 7, "completion": "\n".join(RIGHT), "label": True, "answer": "141"},
        **{"first_error": -1, "right": [True, True, True]},
    }
    assert (rows[1]["first_error"], rows[1]["right"]) == (0, [False, True, True])
    json.dumps(rows)
