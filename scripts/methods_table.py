"""Writes the tables of methods in README.md from their declarations and the recipes: python
scripts/methods_table.py [--check]

One row per registered method: its name in a recipe, paper, the function that is it, the recipes that use it,
and what one of them did at laptop scale (``scripts/measure_recipes.py``). ``--check`` changes nothing and
exits with 1 where the file would change.
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
BEGIN, END = "<!-- methods: made by scripts/methods_table.py -->", "<!-- end of methods -->"
KINDS: tuple[tuple[str, str, Registry], ...] = (
    ("Advantages", "advantage", ADVANTAGES),
    ("Controls: statistics over the whole step or optimizer batch", "control", TOKEN_CONTROLS),
    ("Policy losses", "loss.policy", POLICY_LOSSES),
    ("Additive terms", "loss.terms", LOSS_TERMS),
    ("Coefficients of terms that move", "loss.terms.coefficient", COEFFICIENTS),
    ("Aggregates", "loss.aggregate", AGGREGATES),
    ("Preference and process-reward losses", "loss.preference", PREFERENCE_LOSSES),
)


def used_by(key: str) -> dict[str, list[str]]:
    """Recipes by the name of the method they use under ``key``."""
    found: dict[str, list[str]] = {}
    folders = [ROOT / "recipes" / name for name in ("policy", "preference", "process_reward")]
    for path in sorted(path for folder in folders for path in folder.glob("*.yaml")):
        for name in _names(yaml.safe_load(path.read_text(encoding="utf-8")), key.split(".")):
            found.setdefault(name, []).append(path.relative_to(ROOT / "recipes").with_suffix("").as_posix())
    return found


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


def measured(spec: MethodSpec, recipes: list[str], record: dict[str, Any]) -> str:
    """What the recipe of the method's own did: the one of its name, else of its paper, else the only one.

    Empty where there is none.
    """
    papers = [recipe for recipe in recipes if spec.arxiv and about(recipe).get("arxiv") == spec.arxiv]
    named = [recipe for recipe in recipes if recipe.partition("/")[2] == spec.name]
    own = next(iter(named or papers or (recipes if len(recipes) == 1 else [])), None)
    if own not in record:
        return ""
    found = record[own]
    text = f"{found['measure']} {found['before'][0]:.2f} to {found['after'][0]:.2f}"
    return text + (
        f", entropy {found['entropy'][0]:.2f} to {found['entropy'][1]:.2f}" if "entropy" in found else ""
    )


def about(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")).get("about", {})


def row(spec: MethodSpec, recipes: list[str], record: dict[str, Any]) -> str:
    what = (
        spec.doc.split("\n\n")[0].replace("\n", " ").replace("  ", " ").replace("``", "`").replace("|", "\\|")
    )
    what = what.split(". ")[0].split(", arXiv:")[0].rstrip(".")
    at = f"`{spec.module.removeprefix('rltrain.').replace('.', '/')}.py:{spec.attribute}`"
    shown = recipes if len(recipes) <= 4 else [*recipes[:3], f"{len(recipes) - 3} more"]
    return (
        f"| `{spec.name}` | {spec.arxiv or ''} | {what} | {at} | {', '.join(shown)} | "
        f"{measured(spec, recipes, record)} |"
    )


def tables() -> str:
    record = json.loads((ROOT / "recipes" / "measured.json").read_text(encoding="utf-8"))["recipes"]
    parts = []
    for title, key, registry in KINDS:
        users = used_by(key)
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
    before, rest = text.split(BEGIN)
    fresh = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if arguments.check:
        sys.exit(0 if fresh == text else "README.md is not what scripts/methods_table.py writes; run it")
    readme.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
