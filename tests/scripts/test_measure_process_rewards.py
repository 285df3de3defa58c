"""The measuring of process rewards, on files whose numbers can be said beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import scripts as script_modules


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_modules.script("measure_process_rewards")


def row(
    problem: int, label: bool, right: list[bool | None], rewards: list[float], texts: list[str] | None = None
) -> dict[str, Any]:
    texts = texts or ["xx"] * len(rewards)
    return {
        "problem": problem,
        "label": label,
        "right": right,
        "step_rewards": rewards,
        "score": min(rewards),
        "step_texts": texts,
    }


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Two problems with a right and a wrong solution each; the wrong steps have the lowest rewards but in the last
# row, where steps tie.
ROWS = [
    row(0, True, [True, True, True], [0.1, 0.2, 0.1]),
    row(0, False, [True, False, None], [0.1, -0.9, -0.1], ["x", "xxx", "x"]),
    row(1, True, [True, True], [0.0, 0.1]),
    row(1, False, [False, True], [-0.5, -0.5]),
]


def test_numbers_by_hand(script: ModuleType, tmp_path: Path):
    numbers = script.measure_file(file(tmp_path / "a.jsonl", ROWS), None, {})
    value = {name: estimate.value for name, estimate in numbers.items()}
    assert value["outcome/share right"] == 0.5
    assert value["outcome/auc/sum of rewards"] == 1.0  # 0.4 and 0.1 against -0.9 and -1.0
    # right solutions have 6 and 4 letters, wrong ones 5 and 4: only 4 < 5, and a tie
    assert value["outcome/auc/shorter"] == 0.375
    assert value["outcome/auc/fewer steps"] == 0.5
    # 6 against 5: the wrong solution is shorter; 4 against 4: a tie
    assert value["outcome/auc inside problems/shorter"] == 0.25
    assert value["first wrong step/lowest reward"] == 0.75  # one hit, one of two that tie
    assert value["first wrong step/chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert value["first wrong step/longest step"] == 0.75
    assert (value["first wrong step/first step"], value["first wrong step/last step"]) == (0.5, 0.0)
    # right steps up to the first wrong one: 0.1 0.2 0.1 0.1 0.0 0.1, wrong ones: -0.9 -0.5
    assert value["steps/auc/reward"] == 1.0


def test_the_best_is_chosen_among_the_solutions_of_a_problem(script: ModuleType, tmp_path: Path):
    answers = ["4", "5", "5", "7", "7", "8"]  # problem 0: the vote is wrong; problem 1: it is right
    labels = [True, False, False, True, True, False]
    rewards = [0.5, 0.1, 0.2, 0.3, 0.1, 0.9]
    rows = [
        row(index // 3, labels[index], [labels[index], True], [rewards[index], 1.0])
        | {"answer": answers[index]}
        for index in range(6)
    ]
    value = {
        name: estimate.value
        for name, estimate in script.measure_file(file(tmp_path / "a.jsonl", rows), None, {}).items()
    }
    assert (value["best of 3/vote"], value["best of 3/best possible"]) == (0.5, 1.0)
    assert value["best of 3/sum of rewards"] == 0.5  # right for problem 0, wrong for problem 1
    assert value["best of 3/sum of rewards less the vote"] == 0.0
    assert not any(
        name.startswith("best of")
        for name in script.measure_file(file(tmp_path / "b.jsonl", rows[:5]), None, {})
    )


def test_a_wrong_step_of_a_solution_that_comes_out_right_is_not_looked_for(script: ModuleType):
    assert script.Solution(0, True, (True, False), (0.0, 0.0), 0.0, (1, 1)).wrong is None
    assert script.Solution(0, False, (True, False), (0.0, 0.0), 0.0, (1, 1)).wrong == 1
    assert script.Solution(0, None, (True, False), (0.0, 0.0), 0.0, (1, 1)).wrong == 1


def test_the_commonest_place_is_that_of_other_problems(script: ModuleType):
    rows = [
        script.Solution(problem, None, (True, False, None), (0.0,) * 3, 0.0, (1, 1, 1))
        for problem in range(4)
    ]
    rows.append(script.Solution(4, None, (False, True, None), (0.0,) * 3, 0.0, (1, 1, 1)))
    assert script.places(rows) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_seeds_are_averaged_and_kept(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = [*ROWS[:3], row(1, False, [False, True], [-0.5, 0.5])]
    files = [str(file(tmp_path / f"{seed}.jsonl", rows)) for seed, rows in enumerate((ROWS, other))]
    script.main([*files, "--likelihood", files[0], "--out", str(tmp_path / "found.json")])
    numbers = json.loads((tmp_path / "found.json").read_text())
    assert numbers["first wrong step/lowest reward"]["seeds"] == [0.75, 1.0]
    assert numbers["first wrong step/lowest reward"]["value"] == 0.875
    assert numbers["first wrong step/least likely step"]["seeds"] == [0.75, 0.75]
    assert numbers["first wrong step/lowest reward less least likely step"]["seeds"] == [0.0, 0.25]
    assert "first wrong step/lowest reward" in capsys.readouterr().out


def test_files_that_do_not_fit_are_refused(script: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="line 1: 1 labels of 2 steps"):
        script.read(file(tmp_path / "a.jsonl", [row(0, True, [True], [0.1, 0.2])]))
    complete = file(tmp_path / "b.jsonl", ROWS)
    part = file(tmp_path / "c.jsonl", ROWS[:2])
    with pytest.raises(ValueError, match="score the same file with both"):
        script.measure_file(complete, part, {})
    assert script.read(file(tmp_path / "d.jsonl", [{**ROWS[0], "score": None}])) == []
