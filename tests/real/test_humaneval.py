"""``code_tests`` on HumanEval (../shared/data/code): every canonical solution passes, and no body
that solves nothing.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rltrain.reward.code_tests import code_tests
from rltrain.reward.sandbox import choose_kind
from rltrain.reward.score import RewardInputs, Score

PROBLEMS = Path(__file__).parents[3] / "shared" / "data" / "code" / "humaneval.jsonl"
USELESS = ("    pass\n", "    return True\n")

try:
    choose_kind(False)
except ValueError as error:
    pytest.skip(reason=f"no sandbox here to run programs in: {error}", allow_module_level=True)


def graded(problem: dict[str, Any], *completions: str) -> list[Score]:
    columns = {name: problem[name] for name in ("test", "entry_point")}
    return code_tests(
        RewardInputs(
            problem["prompt"], completions, (1,) * len(completions), ("stop",) * len(completions), columns
        ),
        before_column="prompt",
        seconds=9.0,
    )


@pytest.mark.slow
@pytest.mark.skipif(not PROBLEMS.exists(), reason=f"{PROBLEMS} is absent")
def test_all_canonical_solutions_pass_and_no_useless_body_does():
    problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]
    assert len(problems) == 164
    with ThreadPoolExecutor(max_workers=2) as threads:
        scores = list(
            threads.map(lambda problem: graded(problem, problem["canonical_solution"], *USELESS), problems)
        )
    assert [
        problem["task_id"]
        for problem, (right, *_) in zip(problems, scores, strict=True)
        if right.value != 1.0
    ] == []
    passed = [
        problem["task_id"]
        for problem, (_, *useless) in zip(problems, scores, strict=True)
        if useless != [wrong()] * len(USELESS)
    ]
    assert passed == []


@pytest.mark.slow
@pytest.mark.skipif(not PROBLEMS.exists(), reason=f"{PROBLEMS} is absent")
def test_a_solution_passes_in_a_chat_models_fences_as_well():
    problems = [json.loads(line) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()][::8]
    for problem in problems:
        code = problem["prompt"] + problem["canonical_solution"]
        (score,) = graded(problem, f"Sure!\n```python\n{code}```\nThis works because it does.")
        assert score.value == 1.0, problem["task_id"]


def wrong() -> Score:
    return Score(0.0, {"correct": 0.0, "passed": 0.0, "no_code": 0.0, "timeout": 0.0})
