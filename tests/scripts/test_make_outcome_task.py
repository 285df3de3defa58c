"""How solutions are divided: by problem, and nothing that step labels are about is trained on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task(tiny_models: ModuleType) -> Iterator[ModuleType]:
    """scripts/make_outcome_task.py as a module; beside it lie those that it takes parts from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.delitem(sys.modules, "make_text_model", raising=False)
        yield script("make_outcome_task")
        sys.modules.pop("make_text_model", None)


def test_a_problem_that_shares_a_passage_with_a_labelled_one_is_held_out(task: ModuleType):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    questions = [
        " ".join(words),
        "Tom has " + " ".join(reversed(words)),
        *(f"question {number} " + "abcdefghij"[number] * 9 for number in range(8)),
    ]
    assert task.held_out_problems(questions, ["TWO three, four five six seven eight nine?"], 0.0) == {0}
    seven_words = ["two three four five six seven eight"]  # a chance match
    assert task.held_out_problems(questions, seven_words, 0.0) == set()
    held_out = task.held_out_problems(questions, ["two three four five six seven eight nine"], 0.3)
    assert 0 in held_out and len(held_out) == 3


def test_problems_are_divided_and_not_solutions(task: ModuleType):
    rows = [{"problem": problem, "completion": str(number)} for problem in range(40) for number in range(4)]
    sides = task.divide_by_problem(rows, {0, 1, 2})
    problems = {name: {row["problem"] for row in some} for name, some in sides.items()}
    assert problems["test"] == {0, 1, 2} and len(problems["dev"]) == 3
    assert set.union(*problems.values()) == set(range(40)) and sum(map(len, problems.values())) == 40
    assert {len(some) % 4 for some in sides.values()} == {0}


def test_step_labels_keep_what_nobody_judged(task: ModuleType):
    row = {
        "problem": "p",
        "steps": ["a", "b", "c"],
        "labels": [1, 0, None],
        "first_error_step": 1,
        "source": "S",
    }
    right = {**row, "labels": [1, 1, 1], "first_error_step": -1}
    assert task.step_rows([row, right, {**row, "source": "T"}], "S") == [
        {
            "prompt": "p",
            "completion": "a\nb\nc",
            "steps": ["a", "b", "c"],
            "right": [True, False, None],
            "problem": "p",
        }
    ]
