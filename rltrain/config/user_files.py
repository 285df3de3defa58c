"""Users' files in a recipe: their names, relative to the file that contains them, become absolute and get a
digest of the code.

A resolved recipe therefore refers to the same function from every folder, and changed code is detected.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rltrain.chat_template import is_template_file
from rltrain.config.schema import MethodRef
from rltrain.config.user_code import find_definition
from rltrain.registry import MethodSpec, Registry
from rltrain.reward.source import is_user_spec, source_digest

__all__ = [
    "changed_code",
    "check_method",
    "drop_digest",
    "method_places",
    "with_absolute_names",
    "with_digests",
]

DIGEST = "sha256"  # the key next to ``name``
EACH = None  # stands for each item of a list
# where a recipe names methods
_METHOD_KEYS = (
    ("advantage",),
    ("control", EACH),
    ("loss", "policy"),
    ("loss", "aggregate"),
    ("loss", "terms", EACH, "coefficient"),
    ("loss", "terms", EACH),
    ("loss", "preference"),
    ("process_reward", "loss"),
    ("reward", "functions", EACH),
    ("pairs", "judge"),
    ("rollout", "extra_samples", EACH),
    ("rollout", "environment"),
    ("data", "order"),
)
_ALGORITHM = "sha256:"
_TEMPLATE = "chat_template"


def with_absolute_names(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``data`` of a layer with every ``file.py:name``, and a chat template's file, made absolute, starting
    from ``folder``. Other values are left for the schema to check.
    """
    result = copy.deepcopy(data)
    template = _item(result.get("data"), _TEMPLATE)
    if isinstance(template, str) and is_template_file(template):
        result["data"][_TEMPLATE] = str((folder / Path(template).expanduser()).resolve())
    for holder, key in method_places(result):
        entry = holder[key]
        if isinstance(entry, str):
            holder[key] = absolute_name(entry, folder)
        else:
            entry["name"] = absolute_name(entry["name"], folder)
    return result


def absolute_name(name: str, folder: Path) -> str:
    if not is_user_spec(name):
        return name
    file, _, attribute = name.rpartition(":")
    return f"{(folder / Path(file).expanduser()).resolve()}:{attribute}"


def with_digests(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with a digest added for each readable user's file that has none yet."""
    result = copy.deepcopy(data)
    for holder, key in method_places(result):
        entry = {"name": holder[key]} if isinstance(holder[key], str) else holder[key]
        if (
            is_user_spec(entry["name"])
            and entry.get(DIGEST) is None
            and (digest := _digest(entry["name"])) is not None
        ):
            holder[key] = {**entry, DIGEST: digest}
    return result


def drop_digest(holder: Any, key: str | int) -> None:
    """Removes the digest of the previous name when a new name is set."""
    if key == "name" and isinstance(holder, dict):
        holder.pop(DIGEST, None)


def changed_code(name: str, digest: str | None) -> str | None:
    """A message if the code of ``name`` has changed since the recipe was resolved; None if it has not, or if
    no digest is known.
    """
    current = _digest(name) if is_user_spec(name) else None
    if digest is None or current is None or current == digest:
        return None
    return (
        f"{name.rpartition(':')[0]} or a module beside it has changed since this recipe was resolved "
        f"({DIGEST} {digest[:12]} -> {current[:12]}); restore it, or remove the key {DIGEST} to run the code "
        "as it is now"
    )


def check_method(registry: Registry, ref: MethodRef) -> MethodSpec:
    """The declaration of a recipe's method, the user's own included, with its hyperparameters checked.

    A user's file is imported. Raises ValueError for a name, a file or a hyperparameter that does not fit, and
    for code that has changed since the recipe was resolved.
    """
    if is_user_spec(ref.name):
        file, _, name = ref.name.rpartition(":")
        find_definition(file, name, ast.FunctionDef, ast.ClassDef)
        if (problem := changed_code(ref.name, ref.sha256)) is not None:
            raise ValueError(problem)
    return registry.check(ref.name, ref.hp)


def _digest(name: str) -> str | None:
    try:
        return source_digest(name).removeprefix(_ALGORITHM)
    except ValueError:  # the check of the recipe reports what is wrong with the file
        return None


def method_places(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every method that a recipe names: a name, or a mapping with a name."""
    for *path, last in _METHOD_KEYS:
        for holder in _descend(data, path):
            keys = range(len(holder)) if last is EACH and isinstance(holder, list) else [last]
            for key in keys:
                entry = _item(holder, key)
                if isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
                    yield holder, key


def _descend(data: Any, path: Sequence[Any]) -> list[Any]:
    """The values of ``data`` at ``path``, in which EACH stands for every item of a list."""
    values = [data]
    for part in path:
        if part is EACH:
            values = [item for value in values if isinstance(value, list) for item in value]
        else:
            values = [_item(value, part) for value in values]
    return values


def _item(holder: Any, key: Any) -> Any:
    if isinstance(holder, dict):
        return holder.get(key)
    return holder[key] if isinstance(holder, list) and isinstance(key, int) else None
