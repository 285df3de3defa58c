"""Commands beside training have the recipe's deadline on what they wait for; that it ends the process
is shown in test_deadlines.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rltrain.cli import session
from rltrain.cli.evaluate import eval_command, generate_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import AnyRecipe
from rltrain.errors import UserError, user_mistakes
from rltrain.watchdog import Watchdog

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_of(name: str, model: str, *overrides: str) -> AnyRecipe:
    return check(
        load_recipe(
            RECIPES / f"{name}.yaml", profile="tiny_cpu", overrides=[f"model.path={model}", *overrides]
        )
    ).recipe


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str, str]]:
    """(deadline, whom, what) of every wait of a command."""
    recorded: list[tuple[float, str, str]] = []

    class Listening(Watchdog):
        def __init__(self, seconds: float, *others: Any) -> None:
            super().__init__(seconds, *others)
            self.deadline = seconds

        @contextmanager
        def waiting(self, whom: str, what: str) -> Iterator[None]:
            recorded.append((self.deadline, whom, what))
            with super().waiting(whom, what):
                yield

    monkeypatch.setattr(session, "Watchdog", Listening)
    return recorded


ENGINE = "the transformers engine"


def test_an_evaluation_waits_for_its_engine(random_model: str, waits: Any) -> None:
    settings = ("eval.prompts=4", "eval.n=2", "eval.k=[1]", "reward.workers=1", "train.deadline_seconds=77")
    assert eval_command(random_model, recipe_of("policy/grpo", random_model, *settings), None) == 0
    assert (77, ENGINE, "to start") in waits and (77, ENGINE, "to load version 0") in waits
    assert (77, ENGINE, "to generate 4 x 2 completions of at most 8 tokens with version 0") in waits
    assert (77, ENGINE, "to close") in waits


def test_generation_waits_for_its_engine(random_model: str, waits: Any) -> None:
    recipe = recipe_of("policy/grpo", random_model, "train.deadline_seconds=78")
    assert generate_command(recipe, ["1+2="], 3, 1.0) == 0
    assert (78, ENGINE, "to generate 1 x 3 completions of at most 8 tokens with version 0") in waits


def test_an_offline_evaluation_waits_for_the_engine_of_its_own_samples(
    random_model: str, waits: Any, tmp_path: Path
) -> None:
    settings = (
        "eval.samples=2",
        "eval.examples=4",
        f"reference.cache={tmp_path}",
        "train.deadline_seconds=79",
    )
    assert eval_command(random_model, recipe_of("preference/dpo", random_model, *settings), None) == 0
    assert any(
        wait[:2] == (79, ENGINE) and wait[2].startswith("to generate 2 x 1 completions") for wait in waits
    )
    assert any(wait[1] == "the other ranks" for wait in waits)  # what a second rank would be waited for


def test_what_took_too_long_is_no_mistake_of_the_users() -> None:
    with pytest.raises(TimeoutError), user_mistakes():
        raise TimeoutError("rewards were not ready after 3 s")
    with pytest.raises(UserError, match="no such file"), user_mistakes():
        raise FileNotFoundError("no such file")
