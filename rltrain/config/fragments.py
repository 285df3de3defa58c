"""Checks the YAML files that are not whole recipes: bases and profiles. Recognises Accelerate's files too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rltrain.config.explain import explain
from rltrain.config.load import (
    ENVIRONMENTS_KEY,
    environment_layer,
    merge_mappings,
    profile_layer,
    read_profile,
    recipe_layers,
    schema_of,
)
from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.config.schema import AnyRecipe, OfflineRecipe, OnlineRecipe
from rltrain.config.yaml12 import Document, read
from rltrain.errors import RecipeError
from rltrain.registry import suggestion

Kind = Literal["recipe", "base", "profile", "accelerate"]
_FOLDERS: dict[str, Kind] = {"base": "base", "profiles": "profile", "accelerate": "accelerate"}


def kind_of(path: Path) -> Kind:
    """The kind of a YAML file, which follows from its folder."""
    return _FOLDERS.get(path.absolute().parent.name, "recipe")


def check_fragment(path: Path) -> None:
    """Checks the keys and values of a base or profile; missing keys are no problem.

    Raises RecipeError with every problem.
    """
    if kind_of(path) == "profile":
        document = read_profile(path)
        problems = [
            *_schema_problems(profile_layer(document, OnlineRecipe), OnlineRecipe),
            *_unknown_sizes(document),
            *_environment_problems(document),
        ]
        problems += (
            line
            for line in _schema_problems(profile_layer(document, OfflineRecipe), OfflineRecipe)
            if line not in problems
        )
    else:
        *lower, document = recipe_layers(read(path))
        merged: dict[str, Any] = {}
        for layer in (*lower, document):
            merged = merge_mappings(merged, layer.data)
        problems = list(_schema_problems(document, schema_of(merged)))
    if problems:
        raise RecipeError(problems)


def _schema_problems(document: Document, schema: type[AnyRecipe]) -> list[str]:
    try:
        schema.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        return explain(error, [document], document.source, ignored_types=("missing",), root=schema)
    return []


def _environment_problems(document: Document) -> Iterator[str]:
    for name in document.data.get(ENVIRONMENTS_KEY, {}):
        if name not in ENVIRONMENTS.specs:
            yield (
                f"{document.location_of((ENVIRONMENTS_KEY, name))}: no environment is called "
                f"{name!r}{suggestion(name, ENVIRONMENTS.specs)}"
            )
        yield from _schema_problems(environment_layer(document, name), OnlineRecipe)


def _unknown_sizes(document: Document) -> Iterator[str]:
    known: dict[str, Any] = {}
    for registry in REGISTRIES:
        known |= registry.specs
    for name, sizes in document.data.get("sizes", {}).items():
        if name not in known:
            where = document.location_of(("sizes", name))
            yield f"{where}: no method is called {name!r}{suggestion(name, known)}"
            continue
        for key in sizes:
            if key not in known[name].hyperparameters:
                where = document.location_of(("sizes", name, key))
                yield (
                    f"{where}: {name} has no hyperparameter "
                    f"{key!r}{suggestion(key, known[name].hyperparameters)}"
                )
