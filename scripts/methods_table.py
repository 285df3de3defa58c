"""Writes the tables of methods in README.md from the methods' declarations and the recipes.

    python scripts/methods_table.py [--check]

A row per registered method has its name in a recipe, its paper, its function, the recipes that use it, and
the result of one of them at laptop scale (``scripts/measure_recipes.py``). ``--check`` changes nothing and
exits with 1 if the file would change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rltrain.advantage import ADVANTAGES
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.registry import MethodSpec, Registry

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- methods: made by scripts/methods_table.py -->"
END = "<!-- end of methods -->"
KINDS: tuple[tuple[str, str, Registry], ...] = (
    ("Advantages", "advantage", ADVANTAGES),
    ("Controls: statistics over the whole step or optimizer batch", "control", TOKEN_CONTROLS),
    ("Policy losses", "loss.policy", POLICY_LOSSES),
    ("Additive terms", "loss.terms", LOSS_TERMS),
    ("Coefficients of terms that move", "loss.terms.coefficient", COEFFICIENTS),
    ("Aggregates", "loss.aggregate", AGGREGATES),
    ("Preference and process-reward losses", "loss.preference", PREFERENCE_LOSSES),
)


def recipes_by_method(key: str) -> dict[str, list[str]]:
    """Recipes by the name of the method that they use under ``key``."""
    recipes: dict[str, list[str]] = {}
    folders = [ROOT / "recipes" / name for name in ("policy", "preference", "process_reward")]
    for path in sorted(path for folder in folders for path in folder.glob("*.yaml")):
        for name in _names(yaml.safe_load(path.read_text(encoding="utf-8")), key.split(".")):
            recipes.setdefault(name, []).append(path.relative_to(ROOT / "recipes").with_suffix("").as_posix())
    return recipes


def _names(data: Any, keys: list[str]) -> Iterator[str]:
    if isinstance(data, list):
        for item in data:
            yield from _names(item, keys)
    elif keys:
        if isinstance(data, dict) and keys[0] in data:
            yield from _names(data[keys[0]], keys[1:])
    elif isinstance(data, str):
        yield data
    elif isinstance(data, dict) and "name" in data:
        yield data["name"]


def measured_effect(spec: MethodSpec, recipes: list[str], record: dict[str, Any]) -> str:
    """The result of the method's recipe: the recipe of its name, else of its paper, else the only one.

    Empty if there is no such recipe.
    """
    recipes_of_paper = [
        recipe for recipe in recipes if spec.arxiv and recipe_header(recipe).get("arxiv") == spec.arxiv
    ]
    recipes_of_name = [recipe for recipe in recipes if recipe.partition("/")[2] == spec.name]
    only_recipe = recipes if len(recipes) == 1 else []
    recipe_name = next(iter(recipes_of_name or recipes_of_paper or only_recipe), None)
    if recipe_name not in record:
        return ""
    result = record[recipe_name]
    text = f"{result['measure']} {result['before'][0]:.2f} to {result['after'][0]:.2f}"
    if "entropy" in result:
        text += f", entropy {result['entropy'][0]:.2f} to {result['entropy'][1]:.2f}"
    return text


def recipe_header(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")).get("about", {})


def row(spec: MethodSpec, recipes: list[str], record: dict[str, Any]) -> str:
    description = (
        spec.doc.split("\n\n")[0].replace("\n", " ").replace("  ", " ").replace("``", "`").replace("|", "\\|")
    )
    description = description.split(". ")[0].split(", arXiv:")[0].rstrip(".")
    location = f"`{spec.module.removeprefix('rltrain.').replace('.', '/')}.py:{spec.attribute}`"
    listed = recipes if len(recipes) <= 4 else [*recipes[:3], f"{len(recipes) - 3} more"]
    return (
        f"| `{spec.name}` | {spec.arxiv or ''} | {description} | {location} | {', '.join(listed)} | "
        f"{measured_effect(spec, recipes, record)} |"
    )


def tables() -> str:
    record = json.loads((ROOT / "recipes" / "measured.json").read_text(encoding="utf-8"))["recipes"]
    parts = []
    for title, key, registry in KINDS:
        users = recipes_by_method(key)
        rows = [row(spec, users.get(name, []), record) for name, spec in sorted(registry.specs.items())]
        head = (
            f"**{title}** (`{key}`)\n\n| name | arXiv | what | function | recipes | measured "
            "|\n|---|---|---|---|---|---|\n"
        )
        parts.append(head + "\n".join(rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)
    new_text = f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail.split(END)[1]}"
    if arguments.check:
        sys.exit(0 if new_text == text else "README.md is not what scripts/methods_table.py writes; run it")
    readme.write_text(new_text, encoding="utf-8")


if __name__ == "__main__":
    main()
