"""What the package declares is what it imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# the distribution, where it has another name than the package that is imported
DISTRIBUTIONS = {"yaml": "pyyaml", "math_verify": "math-verify"}
# of extras: imported only where the recipe asks for them
OPTIONAL = {"vllm", "deepspeed", "textworld", "peft", "bitsandbytes", "liger_kernel"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported_packages() -> set[str]:
    """Packages outside the standard library that rltrain imports anywhere."""
    packages: set[str] = set()
    for path in [*(ROOT / "rltrain").rglob("*.py"), *(ROOT / "reward").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                packages.add(node.module.split(".")[0])
    return packages - set(sys.stdlib_module_names) - {"rltrain"}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    imported = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in imported_packages() - OPTIONAL}
    assert names(PROJECT["dependencies"]) == imported


def test_what_is_imported_on_request_has_an_extra() -> None:
    extras = {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}
    assert {name.replace("_", "-") for name in imported_packages() & OPTIONAL} <= extras
