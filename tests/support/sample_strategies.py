"""Hypothesis strategies for the nouns of ``rltrain/types/samples.py``: every field, every kind of value."""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from rltrain.reward.score import Episode, Score
from rltrain.types.samples import SOURCE_NAMES, Completion, Prompt, ScoredGroup, Span, TokenSets

TEXT = st.text(max_size=8)
FLOATS = st.floats()
TOKENS = st.integers(0, 2**31 - 1)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    FLOATS,
    TEXT,
    st.binary(max_size=4),
    st.datetimes(),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(allow_nan=False),
)
COLUMN_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(TEXT | st.just("$type") | st.integers(), inner, max_size=3),
    ),
    max_leaves=6,
)
PROMPTS = st.builds(
    Prompt,
    id=TEXT,
    token_ids=st.lists(TOKENS, min_size=1, max_size=4).map(tuple),
    text=TEXT,
    columns=st.dictionaries(TEXT, COLUMN_VALUES, max_size=3),
    messages=st.none() | st.lists(st.dictionaries(TEXT, COLUMN_VALUES, max_size=2), max_size=2).map(tuple),
)
EPISODES = st.builds(
    Episode,
    reward=FLOATS,
    parts=st.dictionaries(TEXT, FLOATS, max_size=2),
    turns=st.lists(TEXT, max_size=3).map(tuple),
    failure=st.none() | TEXT,
)
SCORES = st.builds(
    Score,
    value=FLOATS,
    parts=st.dictionaries(TEXT, FLOATS, max_size=2),
    ungraded=st.none() | TEXT,
    answer=st.none() | TEXT,
    why=st.none() | TEXT,
    extra=st.dictionaries(TEXT, TEXT, max_size=2),
)


@st.composite
def token_sets(draw: Any, length: int) -> TokenSets:
    """The sets of ``length`` tokens, some of which were drawn from one."""
    sets = TokenSets.empty()
    for _ in range(length):
        ids = draw(st.lists(TOKENS, min_size=1, max_size=3))
        sets.append(array("i", ids), draw(st.floats(width=32)))
    return sets


@st.composite
def completions(draw: Any) -> Completion:
    length = draw(st.integers(1, 6))
    cuts = sorted({0, length, *draw(st.lists(st.integers(1, length), max_size=2))})
    turns = tuple(pairwise(cuts))
    return Completion(
        token_ids=tuple(draw(st.lists(TOKENS, min_size=length, max_size=length))),
        logprobs=tuple(draw(st.lists(FLOATS, min_size=length, max_size=length))),
        finish=draw(st.sampled_from(["stop", "length", "aborted"])),
        text=draw(TEXT),
        versions=tuple(Span(start, stop, draw(st.integers(-1, 2**40))) for start, stop in turns),
        source=draw(st.sampled_from([*SOURCE_NAMES])),
        turns=turns if draw(st.booleans()) else (),
        episode=draw(st.none() | EPISODES),
        kept=draw(st.none() | token_sets(length)),
        worker=draw(TEXT),
    )


@st.composite
def scored_groups(draw: Any) -> tuple[ScoredGroup, ...]:
    """The groups of a step, with ids of their own."""
    groups = []
    for number in draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True)):
        members = tuple(draw(st.lists(completions(), min_size=1, max_size=3)))
        scores = tuple(draw(st.lists(SCORES, min_size=len(members), max_size=len(members))))
        groups.append(ScoredGroup(number, draw(PROMPTS), members, scores))
    return tuple(groups)
