"""The training loops. The package can be called: ``rltrain.train`` is ``rltrain.train_recipe``."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import rltrain


class _CallablePackage(ModuleType):
    """Python makes the package an attribute of ``rltrain``, where it would replace a function ``train``."""

    def __call__(self, recipe: Any, folder: str | Path, *, resume: str = "auto") -> Path:
        """Trains a recipe from ``load_recipe`` in the run folder ``folder``; returns the folder of the
        finished model.
        """
        return rltrain.train_recipe(recipe, folder, resume=resume)


sys.modules[__name__].__class__ = _CallablePackage
