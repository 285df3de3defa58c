"""Built-in tasks: generated, so that a first run needs no download."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from rltrain.config.schema import Section
from rltrain.registry import suggestion
from rltrain.seeds import stable_hash

TASKS = ("arithmetic",)
Split = Literal["train", "test"]


class Arithmetic(Section):
    """``data.options`` of the task "arithmetic": prompts such as ``37+58=`` with the answer ``95``."""

    digits: int = Field(2, ge=1, le=9)  # of each operand, exactly
    operations: str = Field("+", pattern=r"^[-+*]+$")
    count: int = Field(20_000, ge=1)  # at most so many prompts of a split; fewer where there are no more
    held_out: float = Field(0.1, gt=0, lt=1)  # share of operand pairs in the test split
    split_seed: int = 0  # decides which pairs are held out, and nothing else


def arithmetic(split: Split, options: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """Rows of one split in a fixed shuffled order, each problem once.

    A hash of the two operands, whatever their order, decides the split: nothing in one is a permutation of anything in the other.
    """
    task = _options(options or {})
    low = 10 ** (task.digits - 1) if task.digits > 1 else 0
    span = 10**task.digits - low
    total = len(task.operations) * span * span
    share = task.held_out if split == "test" else 1 - task.held_out
    drawn = min(total, int(2 * task.count / share) + 1000)  # about twice what is needed, so that the hash leaves `count`
    rows: list[dict[str, str]] = []
    for index in random.Random(stable_hash("arithmetic", task.split_seed)).sample(range(total), drawn):
        operation, pair = divmod(index, span * span)
        left, right = (low + operand for operand in divmod(pair, span))
        if _is_held_out(left, right, task) == (split == "test"):
            rows.append(_row(left, task.operations[operation], right))
        if len(rows) == task.count:
            break
    return rows


def _is_held_out(left: int, right: int, task: Arithmetic) -> bool:
    return stable_hash("held out", task.split_seed, min(left, right), max(left, right)) < task.held_out * 2**31


def _row(left: int, operation: str, right: int) -> dict[str, str]:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return {"prompt": f"{left}{operation}{right}=", "answer": str(results[operation])}


def _options(options: Mapping[str, Any]) -> Arithmetic:
    for name in options:
        if name not in Arithmetic.model_fields:
            raise ValueError(f"data.options: the task 'arithmetic' has no option {name!r}{suggestion(name, Arithmetic.model_fields)}")
    try:
        task = Arithmetic.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"data.options.{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
    if len(set(task.operations)) < len(task.operations):
        raise ValueError(f"data.options.operations is {task.operations!r}: name each operation once")
    return task
