"""Every rule that reads a completion takes time linear in it: a model that repeats itself forever is
graded in milliseconds.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest

from rltrain.reward import code_text, judge
from rltrain.reward.code_io import same_output
from rltrain.reward.score import RewardInputs
from rltrain.reward.text import answer_format, choice, exact, last_number

LENGTH = 100_000  # characters; a rule that is quadratic takes minutes
SECONDS = 0.25  # of CPU time; the slowest of these rules takes a tenth of it
SHORTER = 20_000  # where a quadratic rule takes seconds

# What the rules look for, and what stands around it.
FRAGMENTS = (
    *(
        "",
        " ",
        "\t",
        "\n",
        " \n",
        "x",
        "1",
        "9,999",
        ".",
        "1.",
        "(",
        ")",
        "{",
        "}",
        "[[",
        "]]",
        "-",
        "<",
        "|",
        "`",
        "```",
        "~",
        "~~~",
    ),
    *(
        "```python\n",
        "```a",
        "**",
        "$",
        "A",
        "(A",
        "A)",
        "is",
        "answer",
        "answer is ",
        "answer: option ",
        "\\boxed{",
        "\\text{",
        "\\text ",
    ),
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<|",
        "<|end|>",
        "####",
        "\n#### ",
        "A:",
        "def ",
        "async ",
        "async def f",
        "class ",
    ),
    *("f =", "[[1", "[[A", "import x\n", "1e", "e9", "inf"),
)


def completion_of(text: str, answer: str = "A") -> RewardInputs:
    return RewardInputs("p", (text,), (1,), ("stop",), {"answer": answer})


RULES: dict[str, Callable[[str], object]] = {
    "program": lambda text: code_text.extract_program(text, None, "f", "auto"),
    "continuation": lambda text: code_text.extract_program(text, "def f(x):\n", "f", "auto"),
    "choice": lambda text: choice(completion_of(text)),
    "last_number": lambda text: last_number(completion_of(text, "1")),
    "exact": lambda text: exact(completion_of(text), numbers=True, ignore_case=True),
    "tags": lambda text: answer_format(completion_of(text), tags=["think", "answer"]),
    "printed": lambda text: same_output(text, "1 2\n3", 1e-6),
    "printed, long": lambda text: (
        same_output(text, f"{text}\n0", 1e-6) or same_output(text, text.replace("1", "2"), 1e-6)
    ),
    "rating": lambda text: judge.parse_rating(text, 1.0, 10.0),
    "letter of a judge": judge.parse_choice,
}
WORST = {
    "tildes": "~" * LENGTH + "`",
    "backticks and letters": "```" + "a" * LENGTH + "`",
    "spaces in front of a fence": (" " * 1000 + "x\n") * (LENGTH // 1000),
    "one line of a fence": "~~~ " + " \t" * (LENGTH // 2) + "`",
    "spaces before a letter": "answer is" + " " * LENGTH + "x",
    "spaces behind a letter": "answer is A" + " " * LENGTH + "a",
    "spaces behind a bracket": "(" + " " * LENGTH + "A" + " " * LENGTH + ")" + " " * LENGTH + "x",
    "digits": "1" * LENGTH + "x",
    "an exponent": "1e" + "9" * LENGTH,
    "thousands": "1" + ",000" * (LENGTH // 4) + "x",
    "a judge that thinks no end": "think " * (LENGTH // 6),
    "open tags": "<answer>" * (LENGTH // 8),
    "open boxes": "\\boxed{" * (LENGTH // 7),
    "open ratings": "[[1" * (LENGTH // 3),
    "open text": "\\text{" * (LENGTH // 6) + "A",
}


def seconds_of(rule: Callable[[str], object], text: str) -> float:
    """CPU time of this process, the least of three where the first is long.

    A collection of the whole session's garbage may fall into one call; a slow rule is slow in each.
    """
    least = float("inf")
    for _ in range(3):
        started = time.process_time()
        rule(text)
        least = min(least, time.process_time() - started)
        if least < SECONDS:
            break
    return least


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WORST)
def test_a_completion_that_repeats_itself_costs_milliseconds(rule: str, name: str):
    assert seconds_of(RULES[rule], WORST[name]) < SECONDS


@pytest.mark.parametrize("rule", RULES)
def test_no_repetition_of_what_a_rule_looks_for_makes_it_slow(rule: str):
    """head, body * n, tail for 1,500 of the 190,000 triples of fragments, others in every rule."""
    triples = random.Random(rule).sample(list(itertools.product(FRAGMENTS, FRAGMENTS[1:], FRAGMENTS)), 1500)
    for head, body, tail in triples:
        text = head + body * (SHORTER // len(body)) + tail
        assert seconds_of(RULES[rule], text) < SECONDS, (head, body, tail)
