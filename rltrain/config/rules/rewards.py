"""Rules about the reward functions of a recipe: user functions, lengths, formats, programs and servers.

Imports no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from rltrain.config.rules.composition import MethodUse
from rltrain.config.schema import RewardRef, SampledRecipe
from rltrain.config.user_code import find_definition, unknown_keywords
from rltrain.config.user_files import changed_code

_SERVED = frozenset({"reward_model_http", "llm_judge", "llm_judge_pairs"})
_JUDGES = frozenset({"llm_judge", "llm_judge_pairs"})
# reward -> its own wall-clock limit for a completion, which must be shorter than that of the pool
_LIMITS = dict.fromkeys(_SERVED, "seconds") | {"code_tests": "seconds", "code_io": "total_seconds"}


def reward_function_problems(recipe: SampledRecipe, rewards: Sequence[MethodUse]) -> Iterator[str]:
    """Settings of registered reward functions that cannot work. rewards: all except the user's own."""
    for reward in rewards:
        if reward.name == "reward_model" and not reward.values["path"]:
            yield (
                f"{reward.key} reward_model: path is empty; set {reward.key}.path to a reward model with one "
                "output, a folder or Hub name"
            )
        if reward.name in _LIMITS:
            yield from _limit_problems(recipe, reward, _LIMITS[reward.name])
        if reward.name in _SERVED:
            yield from _server_problems(recipe, reward)
        if reward.name == "length":
            yield from _length_problems(recipe, reward)
        if reward.name == "format":
            yield from _format_problems(reward)


def is_user_function(name: str) -> bool:
    """Whether a reward is named as ``path/to/file.py:function``."""
    return ":" in name or name.endswith(".py")


def user_function_problems(ref: RewardRef) -> Iterator[str]:
    """Problems of ``path/to/file.py:function``."""
    name = ref.name
    file, colon, function = name.rpartition(":")
    if not colon or not file or not function:
        yield f"{name!r} must name a file and a function in it, as in path/to/file.py:function"
        return
    try:
        node = find_definition(file, function, ast.FunctionDef, ast.AsyncFunctionDef)
    except ValueError as error:
        yield str(error)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from unknown_keywords(node, ref.hp, name)
    problem = changed_code(name, ref.sha256)
    if problem is not None:
        yield problem


def _length_problems(recipe: SampledRecipe, reward: MethodUse) -> Iterator[str]:
    limit = reward.values["max_tokens"]
    buffer = reward.values["buffer_tokens"]
    longest = recipe.rollout.max_tokens
    if limit is None or buffer is None or not 0 < buffer <= limit:
        yield (
            f"{reward.key} length: max_tokens is {limit} and buffer_tokens {buffer}; both are needed, 0 < "
            f"buffer_tokens <= max_tokens; with rollout.max_tokens {longest} write max_tokens: {longest}, "
            f"buffer_tokens: {max(1, longest // 5)}"
        )
    elif limit > longest:
        yield (
            f"{reward.key} length: max_tokens is {limit}, but completions end at rollout.max_tokens "
            f"{longest} and never reach it; set {reward.key}.max_tokens to at most {longest}, and "
            "buffer_tokens below it"
        )


def _format_problems(reward: MethodUse) -> Iterator[str]:
    regex = reward.values["regex"]
    tags = reward.values["tags"]
    if regex is None and not tags:
        yield (
            f"{reward.key} format: nothing is required; set regex, tags (for example [think, answer]) or both"
        )
    if regex is not None:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            yield (
                f"{reward.key} format: regex {regex!r} is not a regular expression: {error}; in YAML put it "
                "in single quotes"
            )


def _limit_problems(recipe: SampledRecipe, reward: MethodUse, limit: str) -> Iterator[str]:
    if reward.values[limit] >= recipe.reward.seconds:
        yield (
            f"{reward.key} {reward.name}: {limit} is {reward.values[limit]:g}, but its process is ended "
            f"after reward.seconds {recipe.reward.seconds:g} and its completions stay ungraded; set "
            "reward.seconds above it"
        )


def _server_problems(recipe: SampledRecipe, reward: MethodUse) -> Iterator[str]:
    try:
        parts = urlsplit(str(reward.values["url"]))
    except ValueError:  # brackets around what is no IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        yield (
            f"{reward.key} {reward.name}: url must be the address of a server, such as "
            f"http://127.0.0.1:8000/v1; set {reward.key}.url"
        )
    if parts.username or parts.password:
        yield (
            f"{reward.key} {reward.name}: the url holds a password, and recipes are copied to other places; "
            "name an environment variable in token_env"
        )
    if reward.name in _JUDGES and not reward.values["model"]:
        yield f"{reward.key} {reward.name}: model is empty; name the judge as its server knows it"
    if reward.name == "llm_judge" and reward.values["high"] <= reward.values["low"]:
        yield (
            f"{reward.key} llm_judge: high {reward.values['high']:g} must be above low "
            f"{reward.values['low']:g}"
        )
    if reward.name == "llm_judge_pairs" and recipe.rollout.n == 1:
        yield (
            f"{reward.key} llm_judge_pairs compares completions of one prompt and rollout.n is 1; raise it, "
            "or use llm_judge"
        )
