"""Ends of steps, in characters and in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from rltrain.data.steps import ends_of_lines, ends_of_listed_steps, ends_of_pattern, step_of_tokens


def pieces(text: str, ends: Sequence[int]) -> list[str]:
    return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", ["one"]),
        ("one\ntwo\n", ["one\n", "two\n"]),
        ("one\n\n\ntwo", ["one\n\n\n", "two"]),  # empty lines belong to the line before
        ("\n\none\n  \ntwo", ["\n\none\n  \n", "two"]),  # blank text at the beginning is not a step
        ("one\n  two", ["one\n", "  two"]),  # indented: the blank before the text is the new line's
        ("", [""]),
    ],
)
def test_lines(text: str, expected: list[str]) -> None:
    assert pieces(text, ends_of_lines(text)) == expected


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"Step \d+:", "Step 1: a\nStep 2: b", ["Step 1: a\n", "Step 2: b"]),
        (r"Step \d+:", "So.\nStep 1: a", ["So.\n", "Step 1: a"]),  # what comes before the first is a step
        (r"(?<=\n\n)", "a\n\nb\n\n", ["a\n\n", "b\n\n", ""]),
        (r"Step", "nothing of the kind", ["nothing of the kind"]),
    ],
)
def test_patterns(pattern: str, text: str, expected: list[str]) -> None:
    assert pieces(text, ends_of_pattern(text, re.compile(pattern))) == expected


def test_given_steps_are_found_in_their_order() -> None:
    assert pieces("a b.\n\n a c. a", ends_of_listed_steps("a b.\n\n a c. a", ["a b.", "a c.", "a"])) == [
        "a b.\n\n ",
        "a c. ",
        "a",
    ]
    with pytest.raises(ValueError, match=r"step 1 'a b.' is not in the completion after the one before"):
        ends_of_listed_steps("a b. a c.", ["a c.", "a b."])
    with pytest.raises(ValueError, match="step 0 is empty"):
        ends_of_listed_steps("a", [" "])


def test_a_token_over_an_end_belongs_to_the_step_that_ends_in_it() -> None:
    texts = ["a", ".\n", "b", ".\nc", "\n", "d", ""]  # the last is an EOS, which decodes to nothing

    def decode(ids: Sequence[int]) -> str:
        return "".join(texts[number] for number in ids)

    ids = list(range(7))
    text = decode(ids)
    assert text == "a.\nb.\nc\nd"
    # lines a. | b. | c | d: the token ".\nc" ends line 1 and contains c, so only the line break after c
    # remains for step 2
    assert step_of_tokens(ids, ends_of_lines(text), decode) == [0, 0, 1, 1, 2, 3, 3]
    # cut after "b" and after ".": both ends lie within tokens; the second of them has no token of its own
    assert step_of_tokens(ids, [4, 5, 6, len(text)], decode) == [0, 0, 0, 1, 3, 3, 3]
