"""Turns pydantic's errors into messages about a recipe: file and line, dotted key, what arrived and what was
expected.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from rltrain.config.schema import COEFFICIENT_TAGS, OnlineRecipe
from rltrain.config.yaml12 import Document, KeyPath
from rltrain.registry import suggestion

# pydantic's terms -> plain YAML terms
_PLAIN_WORDS = {
    "a valid array": "a list",
    "an object": "a mapping of keys",
    "a valid dictionary": "a mapping",
    "a valid string": "text",
}


def explain(
    error: ValidationError,
    layers: Sequence[Document],
    source: str,
    ignored_types: Sequence[str] = (),
    root: type[BaseModel] = OnlineRecipe,
) -> list[str]:
    """One line per problem whose pydantic type is not in ``ignored_types``.

    layers: the parsed files and overrides, lowest first, which locate each key. root: the schema that was
    applied.
    """
    problems: list[Any] = [
        {**item, "loc": _strip_coefficient_tags(item["loc"])}
        for item in error.errors(include_url=False)
        if item["type"] not in ignored_types
    ]
    return [
        f"{find_location(item['loc'], layers, source)}: {_describe_problem(item, root)}" for item in problems
    ]


def _strip_coefficient_tags(key: KeyPath) -> KeyPath:
    """``key`` as it is written in a recipe, without the tag that pydantic adds after ``coefficient`` to say
    whether it is a number or a controller.
    """
    return tuple(
        part
        for previous, part in zip((None, *key), key, strict=False)
        if previous != "coefficient" or part not in COEFFICIENT_TAGS
    )


def find_location(key: KeyPath, layers: Sequence[Document], source: str) -> str:
    """File and line of a key; for a missing key those of its section, or else ``source``, the recipe file."""
    for length in range(len(key), 0, -1):
        for layer in reversed(layers):
            if key[:length] in layer.lines:
                return layer.location_of(key[:length])
    return source


def _describe_problem(item: Any, root: type[BaseModel]) -> str:
    key: KeyPath = item["loc"]
    dotted = ".".join(map(str, key))
    got = f"got {item['input']!r}"
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted}{_nearest_key(key, root)}"
        case "missing":
            return f"{dotted} is missing; {_describe_expected(key, root)}"
        case "literal_error":
            expected = item["ctx"]["expected"]
            return f"{dotted}: {got}, expected {expected}{_nearest_choice(item['input'], expected)}"
        case _:
            message = item["msg"].replace("Input should", "it should", 1)
            for pydantic_words, plain_words in _PLAIN_WORDS.items():
                message = message.replace(pydantic_words, plain_words)
            return f"{dotted}: {got} ({type(item['input']).__name__}); {message}{_remedy(item)}"


def _remedy(item: Any) -> str:
    """The remedy for two mistakes that are easy to make in YAML."""
    value = item["input"]
    if item["type"] == "bool_type" and isinstance(value, str):
        return "; write true or false"
    if item["type"] == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    return ""


def _describe_expected(key: KeyPath, root: type[BaseModel]) -> str:
    """What belongs at a missing key: the required keys of a section, or else the type."""
    annotation = _annotation(key, root)
    section = _section_model(annotation)
    if section is not None:
        number = (
            "float or " if any(float in typing.get_args(item) for item in typing.get_args(annotation)) else ""
        )
        required = ", ".join(name for name, field in section.model_fields.items() if field.is_required())
        return f"expected {number}a section with {required}"
    return f"expected {getattr(annotation, '__name__', str(annotation))}"


def _nearest_key(key: KeyPath, root: type[BaseModel]) -> str:
    """Suggests a sibling with a similar name, the same name in another section, or the list of siblings."""
    name = str(key[-1])
    parent = _section_model(_annotation(key[:-1], root))
    siblings = list(parent.model_fields) if parent else []
    if not difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        other_sections = [".".join(path) for path in schema_keys(root) if path[-1] == name]
        if other_sections:
            return f"; did you mean {' or '.join(other_sections)}?"
    prefix = "".join(f"{part}." for part in key[:-1])
    return (
        suggestion(f"{prefix}{name}", [f"{prefix}{sibling}" for sibling in siblings])
        if prefix
        else suggestion(name, siblings)
    )


def _nearest_choice(value: Any, expected: str) -> str:
    choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(",")]
    matches = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


# the schema as a tree ---------------------------------------------------------------------------------------


def schema_keys(
    model: type[BaseModel] = OnlineRecipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Every key of the schema that holds a value."""
    for name, field in model.model_fields.items():
        section = _section_model(field.annotation)
        if section is None:
            yield (*prefix, name)
        else:
            yield from schema_keys(section, (*prefix, name))


def _annotation(key: KeyPath, root: type[BaseModel]) -> Any:
    """The annotation of a key; None if the schema does not define the key."""
    annotation: Any = root
    for part in key:
        section = _section_model(annotation)
        if isinstance(part, int):
            annotation = next((item for item in typing.get_args(annotation) if item is not Ellipsis), None)
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            return None
    return annotation


def _section_model(annotation: Any) -> type[BaseModel] | None:
    """The section behind ``Section``, ``Section | None`` and ``Annotated[Section, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is tuple:
        return None
    return next((section for item in typing.get_args(annotation) if (section := _section_model(item))), None)
