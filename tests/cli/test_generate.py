"""``rltrain generate``: the answers of one model, or of two side by side."""

from __future__ import annotations

import pytest

from rltrain.cli.evaluate import generate_command
from rltrain.config.load import recipe_of_model
from rltrain.errors import UserError


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_answers_of_two_models_stand_side_by_side(
    random_model: str, random_tied_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe(model: str) -> object:
        return recipe_of_model(model, engine="transformers", max_prompt_tokens=16, max_tokens=3, seed=0)

    answers: list[str] = []
    for model in (random_tied_model, random_model):
        assert generate_command(recipe(model), ["1+1="], n=2, temperature=0.0) == 0
        answers.append("".join(lines_of(capsys)[1].split()))
    assert answers[0] != answers[1]
    assert generate_command(recipe(random_model), ["1+1="], 2, 0.0, before=random_tied_model) == 0
    title, _, first, second = lines_of(capsys)
    assert title.split() == ["prompt", "before", "after"]
    assert "".join(first.split()) == "1+1=" + "".join(answers)
    assert "".join(second.split()) == "".join(answers)  # the prompt stands once


def test_a_template_that_wants_another_column_is_told(random_model: str) -> None:
    recipe = recipe_of_model(random_model, engine="transformers", max_prompt_tokens=16, max_tokens=3, seed=0)
    data = recipe.data.model_copy(update={"prompt_template": "What is {left}?"})
    with pytest.raises(UserError, match=r"asks for the column 'left'.*write the whole question"):
        generate_command(recipe.model_copy(update={"data": data}), ["1+1="], 1, 0.0)
