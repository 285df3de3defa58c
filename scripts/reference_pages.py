"""Writes docs/metrics.md and docs/config.md from the table of metrics and the schema of recipes.

    python scripts/reference_pages.py [--check]

A key's description is the comment beside or above it in rltrain/config/schema.py. ``--check`` changes nothing
and exits with 1 if a file would change.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from methods_table import write_pages
from pydantic import BaseModel

from rltrain.config import schema
from rltrain.report.names import METRICS

ROOT = Path(__file__).parents[1]
METRICS_INTRODUCTION = """# Metrics

Made by `scripts/reference_pages.py` from `rltrain/report/names.py`. A run writes them to `metrics.jsonl` in
its folder, one line per step and per evaluation, and to the trackers in `report.sinks`. A trailing `*`
stands for names that methods and phases choose themselves. Unit 1 is a share or a plain ratio.
"""
CONFIG_INTRODUCTION = """# Keys of a recipe

Made by `scripts/reference_pages.py` from `rltrain/config/schema.py`. Hyperparameters of methods are in
their signatures ([methods](methods.md) names the file) and stand next to the method's name in a recipe.
`kind` is `online` (rewards), `online_pairs` (pairs of the policy's own completions) or `offline` (a data
set of preferences or labels); without it a recipe is `online`, or `offline` if it has `loss.preference`. A
key without a default is required, except sections, whose own table has the defaults. `rltrain plan RECIPE`
prints every value that a recipe implies.
"""


class Key(NamedTuple):
    name: str
    type: str
    default: str
    description: str


def metrics_page() -> str:
    rows = [f"| `{metric.name}` | {metric.unit} | {_cell(metric.what)} |" for metric in METRICS]
    return "\n".join([METRICS_INTRODUCTION, "| name | unit | what |", "|---|---|---|", *rows, ""])


def config_page() -> str:
    places: dict[type[BaseModel], dict[str, list[str]]] = {}
    for kind, recipe in schema.RECIPES.items():
        for key, section in _sections(recipe, ""):
            places.setdefault(section, {}).setdefault(key, []).append(kind)
    parts = [CONFIG_INTRODUCTION]
    for section, kinds_by_key in places.items():
        title = ", ".join(f"`{key}`" if key else "Top level" for key in kinds_by_key)
        kinds = ", ".join(next(iter(kinds_by_key.values())))
        parts += [f"## {title} ({kinds})\n", *_description(section)]
        parts += ["| key | type | default | what |", "|---|---|---|---|"]
        parts += [
            f"| `{key.name}` | {_code(key.type)} | {_code(key.default)} | {_cell(key.description)} |"
            for key in _keys(section)
        ]
        parts.append("")
    return "\n".join(parts)


def _sections(model: type[BaseModel], key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The model and every section inside it, with its dotted key."""
    yield key, model
    for name, field in model.model_fields.items():
        for section in _models_in(field.annotation):
            yield from _sections(section, f"{key}.{name}".lstrip("."))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names; a method's reference is none."""
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    if is_section and annotation is not schema.MethodRef:
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _description(section: type[BaseModel]) -> list[str]:
    return [f"{' '.join((section.__doc__ or '').split()).replace('``', '`')}\n"] if section.__doc__ else []


def _keys(section: type[BaseModel]) -> list[Key]:
    """Keys in the schema's order, those of the base classes first; a class may restate an inherited key."""
    keys: dict[str, Key] = {}
    for parent in reversed(section.__mro__):
        if parent.__module__ == schema.__name__:
            keys.update({key.name: key for key in _declared_keys(parent)})
    return list(keys.values())


def _declared_keys(section: type) -> Iterator[Key]:
    lines, _ = inspect.getsourcelines(section)
    for node in ast.parse("".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = _comment(lines, node.lineno - 1, (node.end_lineno or node.lineno) - 1)
            constraints, default = _default(node.value)
            type_name = " ".join([_type_text(node.annotation), *constraints])
            yield Key(node.target.id, type_name, default, comment)


def _type_text(annotation: ast.expr) -> str:
    """The annotation's source, without what pydantic reads in ``Annotated``."""
    text = ast.unparse(annotation)
    while (shorter := re.sub(r"Annotated\[([\w| ]+)(, \w+\([^()]*\))+\]", r"\1", text)) != text:
        text = shorter
    return text


def _comment(lines: list[str], first: int, last: int) -> str:
    """The comment at the end of the statement's line, else the block of comments above it."""
    beside = lines[last].partition("  # ")[2].strip()
    above: list[str] = []
    while lines[first - 1].strip().startswith("#"):
        first -= 1
        above.insert(0, lines[first].strip().lstrip("# "))
    return beside or " ".join(above)


def _default(value: ast.expr | None) -> tuple[list[str], str]:
    """Constraints such as ">= 1", and the default as source text; "" for a required key."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "Field":
        return [], "" if value is None else _default_text(value)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    constraints = [f"{signs[name]} {ast.unparse(node)}" for name, node in arguments.items() if name in signs]
    return constraints, _default_text(arguments["default"]) if "default" in arguments else ""


def _default_text(node: ast.expr) -> str:
    """The default's source; for a method its name, and nothing for a section, whose own table says it."""
    if isinstance(node, ast.Call):
        return next((ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "name"), "")
    return ast.unparse(node)


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    contents = {
        ROOT / "docs" / "metrics.md": metrics_page(),
        ROOT / "docs" / "config.md": config_page(),
    }
    write_pages(contents, "scripts/reference_pages.py", check=arguments.check)


if __name__ == "__main__":
    main()
