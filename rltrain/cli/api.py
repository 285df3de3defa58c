"""``rltrain train`` and ``rltrain eval``, called from Python."""

from __future__ import annotations

from pathlib import Path

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.saved_recipe import AUTO
from rltrain.cli.evaluate import EVALUATIONS
from rltrain.cli.train import train_command
from rltrain.config.rules import check
from rltrain.config.schema import AnyRecipe
from rltrain.errors import UserError

__all__ = ["evaluate", "train_recipe"]


def train_recipe(recipe: AnyRecipe, folder: str | Path, *, resume: str = AUTO) -> Path:
    """Trains a recipe from ``load_recipe`` in the run folder ``folder``; returns the folder of the finished
    model.

    resume: as ``--resume``. Raises RecipeError for settings that cannot work together, UserError for other
    mistakes and if the run was stopped before its end.
    """
    checked = check(recipe)
    if train_command(checked.recipe, Path(folder), checked.warnings, resume):
        raise UserError(f"the run in {folder} was stopped before its end; train it again to continue")
    return RunFolder.from_path(Path(folder)).model


def evaluate(model: str | Path, recipe: AnyRecipe) -> dict[str, float]:
    """The numbers of ``model`` on the recipe's held-out data, by name. Raises as ``train_recipe`` does."""
    return EVALUATIONS[recipe.kind](str(model), check(recipe).recipe, None)
