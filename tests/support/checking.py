"""What the rules say of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError


def refused(path: Path, *overrides: str) -> tuple[str, ...]:
    """The problems that a recipe is refused for."""
    with pytest.raises(RecipeError) as error:
        check(load_recipe(path, overrides=overrides))
    return error.value.problems


def warnings(path: Path, *overrides: str) -> tuple[str, ...]:
    """Of a recipe that may run."""
    return check(load_recipe(path, overrides=overrides)).warnings
