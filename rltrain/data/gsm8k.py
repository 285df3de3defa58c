"""GSM8K's calculator annotations (arXiv:2110.14168) as prompts: ``<<48/2=24>>`` asks ``48/2=`` and
expects ``24``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from rltrain.data.rows import Row

ANNOTATION = re.compile(r"<<([^<>]*)>>")
EXPRESSION = re.compile(r"[\d.+\-*/()]+")
NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")


def annotations_of(solution: str) -> list[str]:
    """The texts between ``<<`` and ``>>`` in a worked solution, in order."""
    return ANNOTATION.findall(solution)


def calculator_steps(rows: Iterable[Row]) -> tuple[list[Row], Counter[str]]:
    """(rows, counts of what is left out): each expression once, at its first occurrence, as a row with
    "prompt" and "answer".

    Some answers occur in two spellings (``50`` and ``50.00``), of which the shortest is kept; answers are
    otherwise unchanged. Left out and counted are ``repeated`` expressions and ``malformed`` annotations (no
    or several ``=``, a letter in the expression, an answer that is not a decimal number). Raises ValueError
    if a row has no text column "answer".
    """
    places: dict[str, tuple[str, str]] = {}  # expression -> (id, where)
    answers: dict[str, str] = {}
    left_out: Counter[str] = Counter(repeated=0, malformed=0)

    for row in rows:
        solution = row.columns.get("answer")
        if not isinstance(solution, str):
            raise ValueError(
                f"{row.where}: the adapter gsm8k_calculator needs a text column 'answer'; there are "
                f"{sorted(row.columns)}"
            )
        for position, annotation in enumerate(annotations_of(solution)):
            expression, _, answer = annotation.partition("=")
            if not (EXPRESSION.fullmatch(expression) and NUMBER.fullmatch(answer)):
                left_out["malformed"] += 1
                continue
            left_out["repeated"] += expression in places
            places.setdefault(expression, (f"{row.id}.{position}", row.where))
            answers[expression] = min(answers.get(expression, answer), answer, key=len)

    steps = [
        Row(*place, {"prompt": f"{expression}=", "answer": answers[expression]})
        for expression, place in places.items()
    ]
    return steps, left_out
