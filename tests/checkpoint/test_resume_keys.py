"""Which keys of a recipe may differ when a run goes on, and which may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint.saved_recipe import differences, is_free, refuse_other_recipe
from rltrain.config.load import load_recipe
from rltrain.errors import UserError

GRPO = Path(__file__).parents[2] / "recipes/policy/grpo.yaml"
CONSTANT = "learner.optimizer.schedule=constant"


def plain(*overrides: str) -> dict[str, Any]:
    return load_recipe(
        GRPO, profile="tiny_cpu", overrides=[CONSTANT, "train.steps=5", *overrides]
    ).model_dump(mode="json")


def notes_of(*overrides: str) -> list[str]:
    notes: list[str] = []
    refuse_other_recipe(plain(), plain(*overrides), "the run", notes.append)
    return notes


def test_nothing_is_said_of_the_same_recipe() -> None:
    assert notes_of() == []


@pytest.mark.parametrize(
    "override",
    [
        "train.deadline_seconds=3600",
        "train.max_hours=4",
        "reward.workers=7",
        "checkpoint.every=11",
        "checkpoint.keep=5",
        "report.transcripts=9",
        "report.sinks=[tensorboard]",
        "rollout.mismatch_warn=0.3",
        "rollout.workers={count: 3}",
        "rollout.server.url=http://another:80",
        "rollout.server.liveness_seconds=9",
        "about.title=other",
    ],
)
def test_a_key_that_no_number_depends_on_is_named_and_taken(override: str) -> None:
    [note] = notes_of(override)
    assert override.partition("=")[0] in note


@pytest.mark.parametrize(
    "override",
    [
        "reward.seconds=99",
        "reward.memory_gib=1",
        "rollout.mismatch_stop=0.5",
        "rollout.mismatch_patience=9",
        "seed=3",
        "eval.every=7",
        "sync.sample=1",
        "learner.tokens_per_micro_batch=4096",
        "learner.optimizer.lr=1",
        "data.max_prompts=64",
        "rollout.max_rows=3",
    ],
)
def test_any_other_key_is_refused_even_beside_a_free_one(override: str) -> None:
    with pytest.raises(UserError) as refused:
        notes_of(override, "train.deadline_seconds=3600")
    assert f"{override.partition('=')[0]}: " in str(refused.value) and "deadline" not in str(refused.value)


def test_a_longer_run_may_have_another_deadline_too() -> None:
    [note] = notes_of("train.steps=9", "train.deadline_seconds=3600")
    assert "train.deadline_seconds" in note and "train.steps" not in note


def test_a_section_that_appears_is_not_its_free_key() -> None:
    assert is_free("rollout.environment.workers")
    assert not is_free("rollout.environment")
    assert not is_free("checkpointing")


def test_digests_of_users_code_are_not_compared_as_keys_of_the_recipe() -> None:
    saved, current = (
        {"reward": {"functions": [{"name": "/mine.py:f", "sha256": digest}]}}
        for digest in ("a" * 64, "b" * 64)
    )
    assert list(differences(saved, current)) == []
    current["reward"]["functions"][0]["name"] = "/yours.py:f"
    assert [key for key, _, _ in differences(saved, current)] == ["reward.functions.0.name"]
