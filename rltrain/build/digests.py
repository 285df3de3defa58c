"""What a run reads besides its recipe and must read unchanged when it resumes: the date in its prompts,
code, data and models.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rltrain.build.inputs import RunInputs
from rltrain.build.offline import OfflineInputs
from rltrain.chat_template import clock_is_read, is_template_file, prints_date, read_template
from rltrain.checkpoint.inputs import code_digests, column_digests, model_digests
from rltrain.checkpoint.resume import saved_date
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.saved_recipe import AUTO
from rltrain.config.rules.registries import ENVIRONMENTS, REGISTRIES
from rltrain.config.schema import MethodRef, Section
from rltrain.config.user_files import method_places
from rltrain.data.labels import LabelSet
from rltrain.data.preferences import PairSet
from rltrain.data.prompts import PromptSet

__all__ = ["common_date", "input_digests", "with_prompt_date"]

_Recipe = TypeVar("_Recipe", bound=Section)


def with_prompt_date(recipe: _Recipe, date: dt.date | None = None) -> _Recipe:
    """The recipe with the date that chat templates print (``date``, or today) if the template of one
    of its models prints a date.
    """
    settings: Any = recipe
    if settings.data.date is not None or settings.data.chat_template == "none":
        return recipe
    template = settings.data.chat_template
    policy_reads_clock = (
        clock_is_read(read_template(template))
        if is_template_file(template)
        else prints_date(settings.model.path, settings.model.revision)
    )
    if not policy_reads_clock and not any(prints_date(path) for path in judging_models(recipe)):
        return recipe
    data = settings.data.model_copy(update={"date": date or _today()})
    return recipe.model_copy(update={"data": data})


def common_date(recipes: Sequence[Any], out: Path) -> dt.date | None:
    """One date for all runs of a comparison below ``out``: that of its first saved run, else today.

    None: no template prints a date.
    """
    dates = [date for date in (with_prompt_date(recipe).data.date for recipe in recipes) if date is not None]
    if not dates:
        return None
    run_folders = sorted(out.glob("*/seed-*"))
    saved = [
        date
        for date in (saved_date(RunFolder.from_path(folder), AUTO) for folder in run_folders)
        if date is not None
    ]
    return (saved or dates)[0]


_JUDGES: Mapping[str, Callable[[Any], Sequence[MethodRef]]] = {
    "online": lambda recipe: recipe.reward.functions,
    "online_pairs": lambda recipe: [*recipe.reward.functions, recipe.pairs.judge],
    "offline": lambda recipe: (),
    "sft": lambda recipe: (),
}


def judging_models(recipe: Any) -> Iterator[str]:
    """Models that grade or compare completions; each reads them in its own chat template."""
    yield from (str(judge.hp["path"]) for judge in _JUDGES[recipe.kind](recipe) if judge.hp.get("path"))


def input_digests(recipe: Section, inputs: RunInputs | OfflineInputs) -> dict[str, str]:
    """Digests, by name, of what a run reads besides its recipe.

    Raises ValueError if a code file cannot be read.
    """
    recipe_fields = recipe.model_dump(mode="json")
    digests = (
        code_digests(recipe_fields)
        | _package_versions(recipe_fields)
        | model_digests(recipe_fields)
        | column_digests("data.train", rows_of(inputs.train))
    )
    if inputs.held_out is not None:
        digests |= column_digests("data.eval", rows_of(inputs.held_out))
    return digests


def _package_versions(recipe: dict[str, Any]) -> dict[str, str]:
    """The versions of the installed packages whose methods the recipe names."""
    entries = [holder[key] for holder, key in method_places(recipe)]
    names = {entry if isinstance(entry, str) else entry["name"] for entry in entries}
    specs = [spec for registry in (*REGISTRIES, ENVIRONMENTS) for spec in registry.specs.values()]
    used = {spec.package for spec in specs if spec.package and spec.name in names}
    return {f"package {package.rpartition(' ')[0]}": package.rpartition(" ")[2] for package in sorted(used)}


def rows_of(data: PromptSet | PairSet | LabelSet) -> Iterator[Mapping[str, Any]]:
    """One mapping per row: the columns that training and grading read."""
    if isinstance(data, PromptSet):
        yield from ({"prompt": prompt.token_ids, **prompt.columns} for prompt in data.prompts)
        return
    for row in data.pairs if isinstance(data, PairSet) else data.completions:
        yield {column.name: getattr(row, column.name) for column in dataclasses.fields(row)}


def _today() -> dt.date:
    return dt.date.today()
