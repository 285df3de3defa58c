"""Rules about episodes: the environment of a recipe, its options, and what cannot be combined with it.

Imports no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rltrain.config.rules.registries import ENVIRONMENTS, REWARDS
from rltrain.config.schema import EnvironmentRef, OnlineRecipe
from rltrain.config.user_code import find_definition, unknown_keywords
from rltrain.config.user_files import changed_code
from rltrain.needs import OWN_REWARDS, READS_ENVIRONMENT


def user_class(name: str) -> tuple[str, str] | None:
    """File and class of an environment named as ``path/to/file.py:Class``; None for a registered name."""
    file, colon, attribute = name.rpartition(":")
    return (file, attribute) if colon and file.endswith(".py") else None


def environment_problems(recipe: OnlineRecipe) -> Iterator[str]:
    """Settings that cannot work in ``rollout.environment``, and settings that need an environment."""
    ref = recipe.rollout.environment
    rollout = recipe.rollout
    if ref is None:
        return
    yield from _naming_problems(ref)
    if ref.turn_tokens > rollout.max_tokens:
        yield (
            f"rollout.environment.turn_tokens is {ref.turn_tokens}, but a whole episode has "
            f"rollout.max_tokens {rollout.max_tokens}; raise rollout.max_tokens to several turns with their "
            "observations, or lower turn_tokens"
        )
    spec = ENVIRONMENTS.specs.get(ref.name)
    graders = [REWARDS.specs.get(function.name) for function in recipe.reward.functions]
    reads_verdict = all(grader is not None and READS_ENVIRONMENT in grader.traits for grader in graders)
    if spec is not None and OWN_REWARDS not in spec.traits and reads_verdict:
        yield (
            f"rollout.environment {ref.name} gives no reward of its own, so that reward.functions "
            f"{recipe.reward.functions[0].name} would always be 0; grade the last turn, for example with "
            "exact or math_answer"
        )


def _naming_problems(ref: EnvironmentRef) -> Iterator[str]:
    if (location := user_class(ref.name)) is not None:
        yield from (f"rollout.environment: {problem}" for problem in _class_problems(ref, *location))
        return
    try:
        ENVIRONMENTS.check(ref.name, ref.hp)
    except ValueError as error:
        yield f"rollout.environment: {error}; or name your own as path/to/file.py:Class"


def _class_problems(ref: EnvironmentRef, file: str, attribute: str) -> Iterator[str]:
    """Problems of ``path/to/file.py:Class``."""
    try:
        statement = find_definition(file, attribute, ast.ClassDef)
    except ValueError as error:
        yield str(error)
        return
    if (problem := changed_code(ref.name, ref.sha256)) is not None:
        yield problem
    if not isinstance(statement, ast.ClassDef):  # imported or assigned: checked when the object is created
        return

    methods = {node.name: node for node in statement.body if isinstance(node, ast.FunctionDef)}
    missing = [name for name in ("reset", "step", "close") if name not in methods]
    if missing and not statement.bases:
        yield (
            f"{attribute} lacks {', '.join(missing)}; an environment has reset(task, seed), step(text) and "
            "close()"
        )
    if "__init__" in methods:
        yield from unknown_keywords(methods["__init__"], ref.hp, attribute)
