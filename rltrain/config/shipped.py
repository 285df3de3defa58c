"""The recipes and profiles that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from rltrain.errors import RecipeError
from rltrain.registry import suggestion

__all__ = ["RECIPES_FOLDER", "find_recipe", "is_recipe_name"]

RECIPES_FOLDER = (Path(__file__).parents[1] / "recipes").resolve()  # in a checkout that is a link
_FOLDERS = ("policy", "preference", "process_reward")


def is_recipe_name(text: str) -> bool:
    """Whether ``text`` is a name such as ``dapo`` and no path of a file."""
    return not text.endswith((".yaml", ".yml")) and "/" not in text


def find_recipe(name: str) -> Path:
    """The file of the shipped recipe ``name``. Raises RecipeError, suggesting a similar name, if there is
    none.
    """
    recipes = {path.stem: path for folder in _FOLDERS for path in (RECIPES_FOLDER / folder).glob("*.yaml")}
    if name not in recipes:
        remedy = suggestion(name, recipes) or f"; there are no recipes in {RECIPES_FOLDER}"
        raise RecipeError(f"no shipped recipe is called {name!r}{remedy}; a path ends in .yaml")
    return recipes[name]
