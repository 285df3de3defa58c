"""Mistakes about episodes in a recipe, which must be found before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rltrain.config.fragments import check_fragment
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError

ROOT = Path(__file__).parents[3]
CALCULATOR = ROOT / "recipes/policy/empg_calculator.yaml"
TEXTWORLD = ROOT / "recipes/policy/epo_textworld.yaml"
USER_ENVIRONMENTS = ROOT / "tests/support/environments.py"


def load_checked(recipe: Path, *overrides: str, profile: str | None = None) -> Any:
    return check(load_recipe(recipe, profile=profile, overrides=overrides)).recipe


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (
            CALCULATOR,
            ["rollout.environment.name=calculater"],
            "no environment is called 'calculater'; did you mean 'calculator'?",
        ),
        (
            CALCULATOR,
            ["rollout.environment.rooms=3"],
            "environment 'calculator' has no hyperparameter 'rooms'",
        ),
        (TEXTWORLD, ["rollout.environment.room=3"], "has no hyperparameter 'room'; did you mean 'rooms'?"),
        (
            TEXTWORLD,
            ["rollout.environment.commands=all"],
            "commands must be Literal['none', 'listed', 'numbered'], got 'all'",
        ),
        (
            CALCULATOR,
            ["rollout.environment.turn_tokens=4096"],
            "turn_tokens is 4096, but a whole episode has rollout.max_tokens 2048",
        ),
        (CALCULATOR, ["rollout.environment.max_turns=0"], "rollout.environment.max_turns: got 0"),
        (CALCULATOR, ["reward.functions=[episode]"], "calculator gives no reward of its own"),
        (
            CALCULATOR,
            ["rollout.environment=null", "reward.functions=[episode]"],
            "there is none; set rollout.environment",
        ),
        (
            CALCULATOR,
            ["rollout.extra_samples=[answer]", "advantage=grao"],
            "rollout.extra_samples.0 answer adds completions of one turn",
        ),
        (
            CALCULATOR,
            [f"rollout.environment.name={USER_ENVIRONMENTS}:Countnig"],
            "defines no class 'Countnig'; did you mean 'Counting'?",
        ),
        (
            CALCULATOR,
            [f"rollout.environment.name={USER_ENVIRONMENTS}:Unmakeable"],
            "Unmakeable lacks reset, step, close",
        ),
        (
            CALCULATOR,
            [f"rollout.environment.name={USER_ENVIRONMENTS}:Counting", "rollout.environment.turms=3"],
            "no keyword-only argument 'turms'",
        ),
        (CALCULATOR, ["rollout.environment.name=nowhere.py:Counting"], "there is no file "),
        (CALCULATOR, ["rollout.adaptive_temperature.tau=1"], "rollout.adaptive_temperature.tau: got 1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    recipe: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_checked(recipe, *overrides)
    assert expected in str(error.value)


def test_a_user_s_class_is_an_environment_with_its_own_options() -> None:
    ref = load_checked(
        CALCULATOR, f"rollout.environment.name={USER_ENVIRONMENTS}:Counting", "rollout.environment.turns=2"
    ).rollout.environment
    assert ref.hp == {"turns": 2} and ref.max_turns == 8


def test_a_profile_speaks_to_each_environment_apart() -> None:
    plain = load_checked(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu")
    tool = load_checked(CALCULATOR, profile="tiny_cpu")
    game = load_checked(TEXTWORLD, profile="tiny_cpu")
    assert (plain.rollout.max_tokens, plain.rollout.environment) == (8, None)
    assert (tool.data.train, tool.rollout.max_tokens, tool.rollout.environment.turn_tokens) == (
        "arithmetic",
        48,
        12,
    )
    assert (game.data.train, game.data.options["games"], game.rollout.environment.hp["rooms"]) == (
        "textworld",
        24,
        1,
    )
    assert tool.model == game.model == plain.model
    assert (
        load_checked(TEXTWORLD, "rollout.environment.rooms=2", profile="tiny_cpu").rollout.environment.hp[
            "rooms"
        ]
        == 2
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "environments: {textwold: {rollout: {max_tokens: 8}}}\n",
            "no environment is called 'textwold'; did you mean 'textworld'?",
        ),
        ("environments: {calculator: {rollout: {max_tokens: 0}}}\n", "p.yaml:1: rollout.max_tokens: got 0"),
        (
            "environments: {calculator: {advantage: rloo}}\n",
            "a profile replaces model, data and sizes and nothing else",
        ),
    ],
)
def test_a_profile_s_sections_are_held_to_the_schema(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "profiles" / "p.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        check_fragment(path)
    assert expected in str(error.value)
