"""A user's file in a recipe is the same file wherever the recipe is read, and the recipe records a digest of
its code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.errors import RecipeError
from tests.config.conftest import MINIMAL

CODE = "def score(inputs, *, scale=1.0): return [scale] * len(inputs.completions)\n"
ENVIRONMENT = (
    "class Play:\n    def reset(self, task, seed): ...\n    def step(self, text): ...\n    def close(self): "
    "...\n"
)
PLAYED = "{name: 'env.py:Play', max_turns: 2, turn_tokens: 2}"


def recipe_text(function: str, environment: str = "null") -> str:
    text = MINIMAL.replace("functions: [math_answer]", f"functions: [{function}]")
    return text.replace("max_tokens: 8}", f"max_tokens: 8, environment: {environment}}}")


def load(path: Path, *overrides: str, profile: str | None = None) -> OnlineRecipe:
    recipe = load_recipe(path, profile=profile, overrides=overrides)
    assert isinstance(recipe, OnlineRecipe)
    return recipe


@pytest.fixture
def project(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its code, and another current folder with files of the same names."""
    write("project/mine.py", CODE)
    write("project/env.py", ENVIRONMENT)
    write("project/recipe.yaml", recipe_text("'mine.py:score', math_answer", PLAYED))
    write("elsewhere/mine.py", CODE.replace("score", "score, foreign"))
    write("elsewhere/env.py", "raise SystemExit('foreign')\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def test_files_are_those_beside_the_recipe_and_not_those_of_the_current_folder(project: Path) -> None:
    recipe = load(project / "recipe.yaml")
    users, registered = recipe.reward.functions
    assert users.name == f"{project}/mine.py:score" and users.sha256 is not None and len(users.sha256) == 64
    assert (registered.name, registered.sha256) == ("math_answer", None)
    assert (
        recipe.rollout.environment is not None and recipe.rollout.environment.name == f"{project}/env.py:Play"
    )
    assert recipe.rollout.environment.sha256 is not None and recipe.rollout.environment.hp == {} == users.hp
    check(recipe)


@pytest.mark.parametrize("spelling", ["project/recipe.yaml", "./project/../project/recipe.yaml"])
def test_a_relative_recipe_finds_its_files_too(
    project: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.chdir(project.parent)
    assert load(Path(spelling)).reward.functions[0].name == f"{project}/mine.py:score"


def test_a_resolved_recipe_gives_the_same_functions_from_anywhere(
    project: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load(project / "recipe.yaml")
    resolved = write("run/recipe.resolved.yaml", resolved_yaml(recipe))
    write("run/mine.py", "raise SystemExit('foreign')\n")
    for folder in ("elsewhere", "run"):
        monkeypatch.chdir(tmp_path / folder)
        assert load(resolved) == recipe


def test_a_base_names_files_beside_itself(project: Path, write: Callable[..., Path]) -> None:
    child = write("deeper/down/recipe.yaml", "extends: ../../project/recipe.yaml\nseed: 1\n")
    assert load(child).reward.functions[0].name == f"{project}/mine.py:score"
    overriding = write(
        "deeper/down/other.yaml",
        "extends: ../../project/recipe.yaml\nreward: {functions: ['mine.py:score']}\n",
    )
    assert load(overriding).reward.functions[0].name == f"{overriding.parent}/mine.py:score"


@pytest.mark.parametrize(
    "override",
    [
        "reward.functions=['mine.py:score']",
        "reward.functions.0='mine.py:score'",
        "reward.functions.0={name: 'mine.py:score', scale: 2.0}",
        "reward.functions.0.name=mine.py:score",
        "reward={functions: ['./mine.py:score']}",
        "reward.functions=['../elsewhere/mine.py:score']",
    ],
)
def test_the_command_line_names_files_of_the_current_folder(project: Path, override: str) -> None:
    recipe = load(project / "recipe.yaml", override, "rollout.environment.name=env.py:Play")
    function = recipe.reward.functions[0]
    environment = recipe.rollout.environment
    assert environment is not None
    assert function.name == f"{project.parent}/elsewhere/mine.py:score"
    assert environment.name == f"{project.parent}/elsewhere/env.py:Play"
    before = load(project / "recipe.yaml")
    assert before.rollout.environment is not None
    assert function.sha256 not in (None, before.reward.functions[0].sha256)
    assert environment.sha256 not in (None, before.rollout.environment.sha256)


def test_a_profile_names_files_of_the_current_folder(project: Path, write: Callable[..., Path]) -> None:
    profile = write(
        "profiles/mine.yaml",
        "environments: {'../project/env.py:Play': {rollout: {environment: {turn_tokens: 7}}}}\n",
    )
    environment = load(project / "recipe.yaml", profile=str(profile)).rollout.environment
    assert environment is not None and environment.turn_tokens == 7


def test_home_links_and_absolute_paths_are_followed(
    project: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project))
    for name in ("~/mine.py:score", f"{project}/mine.py:score"):
        assert (
            load(write("recipe.yaml", recipe_text(f"'{name}'"))).reward.functions[0].name
            == f"{project}/mine.py:score"
        )
    (project / "link.py").symlink_to("mine.py")
    assert (
        load(project / "recipe.yaml", f"reward.functions.0={project}/link.py:score")
        .reward.functions[0]
        .name.endswith("/mine.py:score")
    )


@pytest.mark.parametrize("changed", ["mine.py", "env.py"])
def test_a_resolved_recipe_whose_code_has_changed_is_refused_until_its_digest_is_taken_out(
    project: Path, write: Callable[..., Path], changed: str
) -> None:
    resolved = write("run/recipe.resolved.yaml", resolved_yaml(load(project / "recipe.yaml")))
    check(load(resolved))
    (project / changed).write_text((project / changed).read_text() + "# changed\n")
    with pytest.raises(
        RecipeError,
        match=rf"{changed} or a module beside it has changed since this recipe was resolved \(sha256 ",
    ):
        check(load(resolved))
    check(load(project / "recipe.yaml"))
    check(load(resolved, "reward.functions.0.sha256=null", "rollout.environment.sha256=null"))


def test_a_file_that_lies_in_the_current_folder_only_is_named_in_the_error(project: Path) -> None:
    (project / "mine.py").unlink()
    with pytest.raises(RecipeError) as caught:
        check(load(project / "recipe.yaml"))
    assert (
        f"there is no file {project}/mine.py; there is {project.parent}/elsewhere/mine.py, but a path in a "
        "recipe starts" in str(caught.value)
    )


@pytest.mark.parametrize("function", ["null", "7", "[x]", "{}", "{name: 7}", "{weight: 1.0}"])
def test_what_is_no_name_is_left_to_the_schema(
    project: Path, write: Callable[..., Path], function: str
) -> None:
    with pytest.raises(RecipeError, match="reward"):
        load(write("recipe.yaml", recipe_text(function)))
