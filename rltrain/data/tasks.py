"""Built-in tasks. Their rows are generated, so that a first run needs no download."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from rltrain.config.schema import Section
from rltrain.registry import suggestion
from rltrain.seeds import stable_hash

TASKS = ("arithmetic", "arithmetic_pairs", "textworld")
Split = Literal["train", "test"]
_Options = TypeVar("_Options", bound=Section)


def _check_question(question: str) -> str:
    """Raises ValueError where a question names something else than the parts of a problem, or not all."""
    parts = {"left": "<1>", "operation": "<2>", "right": "<3>"}
    try:
        text = question.format_map(parts)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(f"{error!r}; write {{left}}, {{operation}} and {{right}}") from error
    if not all(part in text for part in parts.values()):
        raise ValueError("all problems would read alike; write {left}, {operation} and {right}")
    return question


class Arithmetic(Section):
    """``data.options`` of the tasks "arithmetic" and "arithmetic_pairs": prompts such as ``37+58=``
    with the answer ``95``.
    """

    digits: int = Field(2, ge=1, le=9)  # exact number of digits of each operand
    operations: str = Field("+", pattern=r"^[-+*]+$")
    count: int = Field(20_000, ge=1)  # most prompts per split; there may be fewer
    held_out: float = Field(0.1, gt=0, lt=1)  # share of operand pairs in the test split
    split_seed: int = 0  # only decides which operand pairs are held out
    # the prompt, e.g. "What is {left} {operation} {right}?"
    question: Annotated[str, AfterValidator(_check_question)] = "{left}{operation}{right}="


def arithmetic(split: Split, options: Mapping[str, Any] | None = None) -> list[dict[str, str]]:
    """Rows of one split in a fixed shuffled order, each problem once.

    A hash of the two operands, independent of their order, decides the split, so no problem of one split is a
    permutation of a problem of the other.
    """
    task = _parse_options(options or {}, Arithmetic)
    if len(set(task.operations)) < len(task.operations):
        raise ValueError(f"data.options.operations is {task.operations!r}: name each operation once")

    low = 10 ** (task.digits - 1) if task.digits > 1 else 0
    span = 10**task.digits - low
    total = len(task.operations) * span * span
    share = task.held_out if split == "test" else 1 - task.held_out
    # about twice as many as needed, so that ``count`` problems remain after the split
    drawn = min(total, int(2 * task.count / share) + 1000)

    rows: list[dict[str, str]] = []
    for index in random.Random(stable_hash("arithmetic", task.split_seed)).sample(range(total), drawn):
        operation, pair = divmod(index, span * span)
        left, right = (low + operand for operand in divmod(pair, span))
        if _is_held_out(left, right, task) == (split == "test"):
            rows.append(_arithmetic_row(left, task.operations[operation], right, task.question))
        if len(rows) == task.count:
            break
    return rows


def arithmetic_pairs(split: Split, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The same problems as preference pairs: the answer against an answer with some wrong digits.

    A score is the share of correct digits: 1 for chosen, less for rejected. Further columns that a loss may
    need follow artificial rules: p_chosen from the scores, pass_rate from how few digits carry,
    is_target_language true if the first number of the sum is even.
    """
    return [_with_wrong_answer(row) for row in arithmetic(split, options)]


def task_rows(task: str, split: Split, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows of a built-in task by name."""
    match task:
        case "arithmetic":
            return [row | _as_program(row) for row in arithmetic(split, options)]
        case "arithmetic_pairs":
            return arithmetic_pairs(split, options)
        case "textworld":
            return text_games(split, options)
        case _:
            raise ValueError(f"no built-in task is called {task!r}{suggestion(task, TASKS)}")


class TextGames(Section):
    """``data.options`` of the task "textworld": how many games ``rollout.environment`` textworld plays."""

    games: int = Field(100, ge=1, le=1_000_000)  # in the training split
    held_out_games: int = Field(20, ge=1, le=1_000_000)


def text_games(split: Split, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One row per game. The policy receives the opening text of the game instead of the prompt."""
    task = _parse_options(options or {}, TextGames)
    numbers = range(task.games) if split == "train" else range(1_000_000, 1_000_000 + task.held_out_games)
    return [{"prompt": f"game {number}", "game": number} for number in numbers]


def _with_wrong_answer(row: Mapping[str, str]) -> dict[str, Any]:
    """The row with a wrong answer and made-up columns. The wrong digits are drawn with a seed from the
    problem; a first digit never becomes 0.
    """
    answer = row["answer"]
    draw = random.Random(stable_hash("wrong answer", row["equation"]))

    positions = [position for position, character in enumerate(answer) if character.isdigit()]
    wrong = draw.sample(positions, draw.randint(1, len(positions)))
    characters = list(answer)
    for position in wrong:
        characters[position] = draw.choice(
            [
                digit
                for digit in "0123456789"
                if digit != answer[position] and (digit != "0" or position != positions[0])
            ]
        )

    margin = len(wrong) / len(positions)
    made_up = {
        "p_chosen": 0.5 + 0.5 * margin,
        "pass_rate": sum(digit in "01234" for digit in row["equation"] if digit.isdigit())
        / sum(map(str.isdigit, row["equation"])),
        "is_target_language": re.split(r"\D", row["equation"])[0][-1] in "02468",
    }
    return {
        **row,
        "chosen": answer,
        "rejected": "".join(characters),
        "score_chosen": 1.0,
        "score_rejected": 1 - margin,
        **made_up,
    }


def _as_program(row: Mapping[str, str]) -> dict[str, Any]:
    """Columns for the reward ``code_io``: the completion ends a program that must print the answer."""
    return {
        "before": "import atexit\natexit.register(lambda: print(answer))\nanswer = ",
        "tests": [{"input": "", "output": row["answer"]}],
    }


def _is_held_out(left: int, right: int, task: Arithmetic) -> bool:
    return (
        stable_hash("held out", task.split_seed, min(left, right), max(left, right)) < task.held_out * 2**31
    )


def _arithmetic_row(left: int, operation: str, right: int, question: str) -> dict[str, str]:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return {
        "prompt": question.format(left=left, operation=operation, right=right),
        "answer": str(results[operation]),
        "equation": f"{left}{operation}{right}=",  # names the problem
    }


def _parse_options(options: Mapping[str, Any], kind: type[_Options]) -> _Options:
    for name in options:
        if name not in kind.model_fields:
            raise ValueError(
                "data.options: this built-in task has no option "
                f"{name!r}{suggestion(name, kind.model_fields)}"
            )
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"data.options.{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
