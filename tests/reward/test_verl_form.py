"""verl's ``compute_score`` as a user's reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rltrain.reward.resolve import RewardCall, resolve
from rltrain.reward.score import RewardInputs, Score

FILE = """
def plain(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == str(ground_truth))

def detailed(data_source, solution_str, ground_truth, extra_info, weight=1.0):
    extra_info["seen"] = True  # of a copy
    return {"score": weight * len(solution_str), "acc": solution_str == ground_truth, "source": data_source}

async def later(data_source, solution_str, ground_truth, extra_info=None, **keywords):
    return 2.0 * (solution_str == ground_truth)

def unfinished(solution_str, ground_truth):
    return 0.0

def empty(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0}
"""


def scores(folder: Path, name: str, columns: dict[str, Any], **hp: Any) -> list[Score]:
    (folder / "mine.py").write_text(FILE)
    grader = resolve(RewardCall(f"{folder / 'mine.py'}:{name}", 1.0, hp))
    return grader(RewardInputs("p", ("7", "12"), (1, 2), ("stop", "stop"), columns))


@pytest.mark.parametrize(
    "columns",
    [{"ground_truth": "7"}, {"reward_model": {"style": "rule", "ground_truth": "7"}}, {"answer": 7}],
    ids=["ground_truth", "reward_model", "answer"],
)
def test_each_completion_is_scored_against_the_rows_ground_truth(
    columns: dict[str, Any], tmp_path: Path
) -> None:
    assert [score.value for score in scores(tmp_path, "plain", columns)] == [1.0, 0.0]


def test_a_dict_gives_score_parts_and_texts_and_changes_no_row(tmp_path: Path) -> None:
    columns = {"ground_truth": "7", "data_source": "gsm8k", "extra_info": {"index": 3}}
    first, second = scores(tmp_path, "detailed", columns, weight=0.5)
    assert (first.value, first.parts["acc"], first.extra["source"]) == (0.5, 1.0, "gsm8k")
    assert (second.value, second.parts["acc"]) == (1.0, 0.0)
    assert columns["extra_info"] == {"index": 3}


def test_it_may_be_async_and_take_hyperparameters(tmp_path: Path) -> None:
    results = scores(tmp_path, "later", {"ground_truth": "12"}, anything=1)
    assert [score.value for score in results] == [0.0, 2.0]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not take data_source, extra_info"):
        scores(tmp_path, "unfinished", {"ground_truth": "7"})
    with pytest.raises(ValueError, match="does not take weight"):
        scores(tmp_path, "plain", {"ground_truth": "7"}, weight=2.0)
    with pytest.raises(ValueError, match="its columns are: level"):
        scores(tmp_path, "plain", {"level": 2})
    with pytest.raises(ValueError, match="without a number under 'score'"):
        scores(tmp_path, "empty", {"ground_truth": "7"})
