"""Checks which settings and methods can be combined: what the schema of a recipe cannot express.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rltrain.config.model_config import context_problems
from rltrain.config.rules.adapter import adapter_problems, adapter_warnings
from rltrain.config.rules.attention import attention_problems
from rltrain.config.rules.findings import Findings
from rltrain.config.rules.offline import check_offline
from rltrain.config.rules.online import check_online
from rltrain.config.rules.online_pairs import check_pairs
from rltrain.config.rules.push import push_problems
from rltrain.config.rules.schedule import schedule_problems, schedule_warnings
from rltrain.config.rules.server import add_importance_weights
from rltrain.config.rules.templates import template_problems
from rltrain.config.schema import AnyRecipe
from rltrain.errors import RecipeError

__all__ = ["CheckedRecipe", "check"]

RULES: Mapping[str, Callable[[Any], Findings]] = {
    "online": check_online,
    "online_pairs": check_pairs,
    "offline": check_offline,
    "sft": check_offline,
}


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe that passed all rules, and warnings for its author."""

    recipe: AnyRecipe
    warnings: tuple[str, ...]


def check(recipe: AnyRecipe) -> CheckedRecipe:
    """Applies every rule for the recipe's kind. Raises RecipeError with all problems."""
    findings = RULES[recipe.kind](recipe)
    problems = [
        *findings.problems,
        *template_problems(recipe.data),
        *context_problems(recipe),
        *attention_problems(recipe),
        *adapter_problems(recipe),
        *push_problems(recipe.push, recipe.checkpoint),
        *schedule_problems(recipe),
    ]
    if problems:
        raise RecipeError(problems)
    weighted, notes = add_importance_weights(recipe)
    warnings = (*findings.warnings, *adapter_warnings(recipe), *schedule_warnings(recipe), *notes)
    return CheckedRecipe(weighted, warnings)
