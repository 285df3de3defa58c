"""Shipped recipes by name, and copies of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rltrain.chat_template import is_template_file, read_template
from rltrain.cli.app import app
from rltrain.config.load import load_recipe
from rltrain.config.shipped import copy_recipe, find_recipes, recipe_file
from rltrain.errors import RecipeError, UserError

NAMES = [name for name, _, _ in find_recipes()]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_recipe_is_that_recipe_with_its_comments(name: str, tmp_path: Path) -> None:
    text = copy_recipe(name, tmp_path / "mine.yaml")
    copied, shipped = load_recipe(tmp_path / "mine.yaml"), load_recipe(name)
    if is_template_file(template := copied.data.chat_template):  # copied beside it
        assert Path(template).parent == tmp_path
        assert read_template(template) == read_template(shipped.data.chat_template)
        data = copied.data.model_copy(update={"chat_template": shipped.data.chat_template})
        copied = copied.model_copy(update={"data": data})
    assert copied == shipped
    comments = [line for line in recipe_file(name).read_text("utf-8").splitlines() if "#" in line]
    assert comments == [line for line in text.splitlines() if "#" in line][2:]


def test_a_copy_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already; name another file"):
        copy_recipe("grpo", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        copy_recipe("grpo", tmp_path / "nowhere" / "mine.yaml")


def test_a_file_here_precedes_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file("grpo").name == "grpo.yaml"
    (tmp_path / "grpo").write_text("extends: dapo\n")
    assert recipe_file("grpo") == Path("grpo") and load_recipe("grpo") == load_recipe("dapo")
    with pytest.raises(RecipeError, match="did you mean 'dapo'"):
        recipe_file("dapoo")
    assert recipe_file("elsewhere/mine.yaml") == Path("elsewhere/mine.yaml")


def test_recipes_are_listed_by_a_word_of_name_folder_or_title() -> None:
    listed = CliRunner().invoke(app, ["recipes", "ENTROPY"]).output
    assert "clip_cov" in CliRunner().invoke(app, ["recipes", "2505.22617"]).output
    assert "entropy" in listed and len(listed.splitlines()) < len(NAMES)
    assert len(CliRunner().invoke(app, ["recipes"]).output.splitlines()) == len(NAMES) + 1
    refused = CliRunner().invoke(app, ["recipes", "nothing-like-it"])
    assert "no shipped recipe has 'nothing-like-it'" in str(refused.exception)
