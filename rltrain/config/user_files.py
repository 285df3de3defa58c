"""Users' files in a recipe: their names, relative to the file that contains them, become absolute and get a
digest of the code.

A resolved recipe therefore refers to the same function from every folder, and changed code is detected.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reward.source import is_user_spec, source_digest

__all__ = ["changed_code", "drop_digest", "with_absolute_names", "with_digests"]

DIGEST = "sha256"  # the key next to ``name``
_ALGORITHM = "sha256:"


def with_absolute_names(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``data`` of a layer with every ``file.py:name`` made absolute, starting from ``folder``. Other values
    are left for the schema to check.
    """
    result = copy.deepcopy(data)
    for holder, key in _user_method_places(result):
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
    for holder, key in _user_method_places(result):
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


def _digest(name: str) -> str | None:
    try:
        return source_digest(name).removeprefix(_ALGORITHM)
    except ValueError:  # the check of the recipe reports what is wrong with the file
        return None


def _user_method_places(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every method that may be a user's: a name, or a mapping with a name."""
    reward = data.get("reward")
    rollout = data.get("rollout")
    functions = reward.get("functions") if isinstance(reward, dict) else None

    places: list[tuple[Any, Any]] = []
    if isinstance(functions, list):
        places += [(functions, index) for index in range(len(functions))]
    if isinstance(rollout, dict):
        places.append((rollout, "environment"))

    for holder, key in places:
        entry = holder[key] if isinstance(holder, list) else holder.get(key)
        if isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            yield holder, key
