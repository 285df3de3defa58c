"""What a run reads beside its recipe and must read again when it goes on: the date in its prompts,
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
from rltrain.checkpoint.inputs import code_digests, column_digests, model_digests
from rltrain.checkpoint.resume import AUTO, saved_date
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.schema import MethodRef, Section
from rltrain.data.labels import LabelSet
from rltrain.data.preferences import PairSet
from rltrain.data.prompts import PromptSet
from rltrain.template_date import prints_date

__all__ = ["common_date", "input_digests", "with_prompt_date"]

_Recipe = TypeVar("_Recipe", bound=Section)


def with_prompt_date(recipe: _Recipe, date: dt.date | None = None) -> _Recipe:
    """The recipe with the date that chat templates print, where one of its models has such a
    template: ``date``, or today.
    """
    settings: Any = recipe
    if settings.data.date is not None or settings.data.chat_template == "none":
        return recipe
    templates = [
        (settings.model.path, settings.model.revision),
        *((path, None) for path in judging_models(recipe)),
    ]
    if not any(prints_date(path, revision) for path, revision in templates):
        return recipe
    data = settings.data.model_copy(update={"date": date or _today()})
    return recipe.model_copy(update={"data": data})


def common_date(recipes: Sequence[Any], out: Path) -> dt.date | None:
    """One date for all runs of a comparison below ``out``, that of its first run where there is one;
    None: no template prints any.
    """
    dates = [date for date in (with_prompt_date(recipe).data.date for recipe in recipes) if date is not None]
    if not dates:
        return None
    begun = sorted(out.glob("*/seed-*"))
    saved = [
        date for date in (saved_date(RunFolder.at(folder), AUTO) for folder in begun) if date is not None
    ]
    return (saved or dates)[0]


_JUDGES: Mapping[str, Callable[[Any], Sequence[MethodRef]]] = {
    "online": lambda recipe: recipe.reward.functions,
    "online_pairs": lambda recipe: [*recipe.reward.functions, recipe.pairs.judge],
    "offline": lambda recipe: (),
}


def judging_models(recipe: Any) -> Iterator[str]:
    """Models that grade or compare completions, which they read in a template of their own."""
    yield from (str(judge.hp["path"]) for judge in _JUDGES[recipe.kind](recipe) if judge.hp.get("path"))


def input_digests(recipe: Section, inputs: RunInputs | OfflineInputs) -> dict[str, str]:
    """Digests by name of what a run of the recipe reads beside it.

    Raises ValueError where a file of code cannot be read.
    """
    plain = recipe.model_dump(mode="json")
    found = code_digests(plain) | model_digests(plain) | column_digests("data.train", rows_of(inputs.train))
    if inputs.held_out is not None:
        found |= column_digests("data.eval", rows_of(inputs.held_out))
    return found


def rows_of(data: PromptSet | PairSet | LabelSet) -> Iterator[Mapping[str, Any]]:
    """What is trained on and graded by, a mapping for each row."""
    if isinstance(data, PromptSet):
        yield from ({"prompt": prompt.token_ids, **prompt.columns} for prompt in data.prompts)
    else:
        rows = data.pairs if isinstance(data, PairSet) else data.completions
        yield from ({one.name: getattr(row, one.name) for one in dataclasses.fields(row)} for row in rows)


def _today() -> dt.date:
    return dt.date.today()
