"""Comparisons: equal conditions, runs that go on where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.analysis.compare_runs import PlannedRun, compare_conditions, plan_runs, run_all
from rltrain.errors import RecipeError, UserError

RECIPES = Path(__file__).parents[2] / "recipes" / "policy"


def test_methods_may_differ_and_other_differences_are_told() -> None:
    # Under the profile both have the same model, data and sizes; dapo takes 16 updates per step where grpo
    # takes another number.
    notes = compare_conditions([RECIPES / "grpo.yaml", RECIPES / "dapo.yaml"], "tiny_cpu", [])
    assert any(note.startswith("learner.updates differs") for note in notes)
    assert not any(
        note.startswith(("loss", "advantage", "reward", "rollout.dynamic_sampling")) for note in notes
    )
    equal = compare_conditions(
        [RECIPES / "grpo.yaml", RECIPES / "dapo.yaml"], "tiny_cpu", ["learner.updates=4"]
    )
    assert not any("learner.updates" in note for note in equal)


def test_other_models_or_data_are_no_comparison() -> None:
    with pytest.raises(RecipeError, match=r"model\.path differs: grpo .* dapo .*choose a --profile"):
        compare_conditions([RECIPES / "grpo.yaml", RECIPES / "dapo.yaml"], None, [])


def test_pairs_and_single_completions_are_counted_apart() -> None:
    # 16 pairs a step are 32 completions: that train.examples differs is told, and no reason to refuse
    folder = RECIPES.parent / "studies" / "preference"
    notes = compare_conditions([folder / "dpo.yaml", folder / "kto.yaml"], None, [])
    assert notes == ["train.examples differs: dpo 16, kto 32"]
    with pytest.raises(RecipeError, match=r"train\.steps differs"):
        compare_conditions([folder / "dpo.yaml", folder / "dpo_votes.yaml"], None, [])


def test_every_recipe_runs_under_every_seed_seed_by_seed() -> None:
    plan = plan_runs([Path("a.yaml"), Path("b.yaml")], 2, Path("out"), "tiny_cpu", ["train.steps=3"])
    assert [(run.method, run.seed) for run in plan] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert plan[2].folder == Path("out/a/seed-1")
    assert plan[2].command[3:] == (
        "train",
        "a.yaml",
        "--profile",
        "tiny_cpu",
        "--set",
        "train.steps=3",
        "--seed",
        "1",
        "--run",
        "out/a/seed-1",
    )


def test_a_run_that_fails_is_named_and_ends_the_comparison(tmp_path: Path) -> None:
    marks = [tmp_path / "first", tmp_path / "second"]
    plan = [
        PlannedRun("a", 0, ("sh", "-c", f"touch {marks[0]}; exit 7"), tmp_path),
        PlannedRun("b", 0, ("sh", "-c", f"touch {marks[1]}"), tmp_path),
    ]
    with pytest.raises(UserError, match="a, seed 0 ended with exit code 7"):
        run_all(plan, lambda line: None)
    assert marks[0].exists() and not marks[1].exists()
