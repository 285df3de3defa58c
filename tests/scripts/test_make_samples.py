"""Rows made of a model's graded completions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rltrain.build.offline import load_offline_inputs
from rltrain.config.load import load_recipe
from rltrain.config.schema import OfflineRecipe
from rltrain.data.labels import LabelSet
from rltrain.reward.score import Score
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span
from support.scripts import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return script("make_samples")


def group(*scores: tuple[str, float, bool | None]) -> ScoredGroup:
    """A group of completions (text, reward, whether it is right; None: ungraded)."""
    completions = tuple(Completion((1,), (-0.5,), "stop", text, (Span(0, 1, 0),)) for text, _, _ in scores)
    marks = tuple(
        Score(0.0, ungraded="timeout") if right is None else Score(value, {"correct": float(right)})
        for _, value, right in scores
    )
    return ScoredGroup(0, Prompt("row 1", (1,), "2+2=", {"solution": "so 4"}), completions, marks)


def rows(made: ModuleType, form: str, scored: ScoredGroup, *words: str) -> list[dict[str, Any]]:
    arguments = made.parse(["model", "--recipe", "grpo", "--as", form, "--out", "rows.jsonl", *words])
    return list(made.FORMS[form](scored, arguments))


MIXED = (("5", -1.0, False), ("4", 1.0, True), ("?", 9.0, None), ("four", 2.0, True))


def test_each_form_of_a_prompt_with_right_wrong_and_ungraded_completions(made: ModuleType):
    scored = group(*MIXED)
    assert rows(made, "labels", scored) == [
        {"completion": "5", "label": 0},
        {"completion": "4", "label": 1},
        {"completion": "four", "label": 1},
    ]
    assert rows(made, "pass_rate", scored) == [{"completion": "so 4", "pass_rate": 2 / 3}]
    assert rows(made, "answers", scored) == [{"answer": "4"}]
    assert rows(made, "pairs", scored) == [{"chosen": "four", "rejected": "5"}]
    assert rows(
        made, "graded_pairs", group(*MIXED, ("4", 1.0, True), ("5", -1.0, False), ("6", -1.0, False))
    ) == [
        {"chosen": "4", "rejected": "5", "score_chosen": 1.0, "score_rejected": -1.0},
        {"chosen": "four", "rejected": "4", "score_chosen": 2.0, "score_rejected": 1.0},
    ]  # of the last two, neither is better
    [row] = rows(made, "probabilities", scored, "--scale", "2")
    assert row == {"chosen": "four", "rejected": "5", "p_chosen": pytest.approx(1 / (1 + math.exp(-1.5)))}


@pytest.mark.parametrize("form", ["labels", "pass_rate", "answers", "pairs", "graded_pairs", "probabilities"])
def test_a_prompt_without_a_graded_completion_has_no_row(made: ModuleType, form: str):
    assert rows(made, form, group(("4", 1.0, None))) == []


def test_a_prompt_whose_completions_are_equally_good_has_no_pair_and_none_right_no_answer(made: ModuleType):
    wrong = group(("5", 0.0, False), ("6", 0.0, False))
    assert [rows(made, form, wrong) for form in ("pairs", "graded_pairs", "answers")] == [[], [], []]
    assert rows(made, "probabilities", wrong) == []
    assert rows(made, "pass_rate", wrong) == [{"completion": "so 4", "pass_rate": 0.0}]


def test_a_column_that_the_data_lack_is_named(made: ModuleType):
    with pytest.raises(ValueError, match=r"--solution proof: the data has the columns \['solution'\]"):
        rows(made, "pass_rate", group(*MIXED), "--solution", "proof")


def test_what_it_writes_is_what_a_recipe_reads(made: ModuleType, random_model: str, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    words = ["--recipe", str(ROOT / "recipes/policy/grpo.yaml"), "--profile", "tiny_cpu", "--n", "2"]
    words += ["--prompts", "5", "--solution", "answer", "--set", f"model.path={random_model}"]
    made.main([random_model, *words, "--as", "pass_rate", "--out", str(out)])
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(written) == 5
    for row in written:
        left, _, right = row["prompt"].rstrip("=").partition("+")
        assert int(left) + int(right) == int(row["completion"]) and 0 <= row["pass_rate"] <= 1

    settings = [f"data.train={out}", f"model.path={random_model}", "data.max_completion_tokens=8"]
    settings += ["data.max_prompt_tokens=16", "train.examples=5"]
    recipe = load_recipe(ROOT / "recipes/preference/dco_pass_rate.yaml", overrides=settings)
    assert isinstance(recipe, OfflineRecipe)
    loaded = load_offline_inputs(recipe).train
    assert isinstance(loaded, LabelSet) and len(loaded) == 5
    assert {example.columns["pass_rate"] for example in loaded.completions} == {
        row["pass_rate"] for row in written
    }
