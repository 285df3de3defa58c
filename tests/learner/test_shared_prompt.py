"""Lines of rows that share a prompt: their tokens, their attention masks, and when lines are shared."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.learner.shared_prompt import build_shared, line_length, lines_of
from rltrain.types.policy import TokenRows

PROMPTS = ((10, 11), (20,), (10, 11), (10, 11))
ROWS = TokenRows(PROMPTS, ((1, 2, 3), (4,), (5, 6), ()))


def test_a_line_by_hand() -> None:
    micro_batch = build_shared(ROWS, [[0, 2, 3], [1]])
    # Completions without their last token: 10 11 | 1 2 | 5 | nothing; each goes on from position 2.
    assert micro_batch.input_ids.tolist() == [[10, 11, 1, 2, 5], [20, 0, 0, 0, 0]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]
    # Rows in the lines' order. Their prompts' last tokens, at 1 and at 5 + 0, predict the first tokens.
    assert micro_batch.rows.tolist() == [0, 2, 3, 1] and micro_batch.width == 3
    assert micro_batch.targets.tolist() == [1, 2, 3, 5, 6, 4] and micro_batch.index.tolist() == [
        1,
        2,
        3,
        1,
        4,
        5,
    ]
    assert micro_batch.row.tolist() == [0, 0, 0, 1, 1, 3] and micro_batch.column.tolist() == [
        0,
        1,
        2,
        0,
        1,
        0,
    ]
    assert micro_batch.attention_mask is not None
    assert micro_batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_rows_come_in_the_requested_order() -> None:
    micro_batch = build_shared(ROWS, [[0, 2], [1]], order=[2, 1, 0])
    assert micro_batch.rows.tolist() == [2, 1, 0]
    assert micro_batch.targets.tolist() == [5, 6, 4, 1, 2, 3] and micro_batch.row.tolist() == [
        0,
        0,
        1,
        2,
        2,
        2,
    ]


def test_rows_of_other_prompts_and_empty_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="rows 0 and 1 have different prompts"):
        build_shared(ROWS, [[0, 1]])
    with pytest.raises(ValueError, match="row 0 has an empty prompt"):
        build_shared(TokenRows(((),), ((1,),)), [[0]])


def test_a_prompt_is_shared_where_that_saves_a_fifth() -> None:
    separate = [[0], [1], [2], [3]]
    long = TokenRows(((1, 2),) * 4, ((3,) * 30,) * 4)  # at best 2 + 4 x 29 = 118 of 4 x 31 = 124
    assert lines_of(long, range(4), hidden=64, budget=1000) == separate
    alike = TokenRows(((1, 2, 3, 4),) * 4, ((5, 6),) * 4)  # 4 + 4 x 1 = 8 of 4 x 5 = 20
    assert lines_of(alike, range(4), hidden=64, budget=1000) == [[0, 1, 2, 3]]
    assert lines_of(TokenRows(((1,), (2,)), ((3, 4), (5, 6))), range(2), hidden=64, budget=1000) == [[0], [1]]


def test_lines_are_as_long_as_attention_over_all_of_them_pays() -> None:
    # P = 100, C - 1 = 50, H = 8: sqrt(100 (48 + 100)) / 50 = 2.4 rows a line, 8 / 2.4 = 3.3: three lines of
    # 3, 3 and 2.
    rows = TokenRows(((1,) * 100,) * 8, ((2,) * 51,) * 8)
    assert sorted(map(len, lines_of(rows, range(8), hidden=8, budget=10_000))) == [2, 3, 3]
    # H = 512: sqrt(100 (3,072 + 100)) / 50 = 11.3, so all eight.
    assert lines_of(rows, range(8), hidden=512, budget=10_000) == [list(range(8))]
    # A budget of 300 tokens holds 100 + 4 x 50.
    assert sorted(map(len, lines_of(rows, range(8), hidden=512, budget=300))) == [4, 4]


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=30),
    hidden=st.sampled_from([1, 64, 4096]),
    budget=st.integers(1, 300),
)
def test_every_row_is_once_in_a_line_of_its_prompt_within_the_budget(
    drawn: list[tuple[int, int]], hidden: int, budget: int
) -> None:
    rows = TokenRows(
        tuple((7,) * (5 * kind + 1) for kind, _ in drawn), tuple((1,) * length for _, length in drawn)
    )
    positions = list(reversed(range(len(rows))))
    lines = lines_of(rows, positions, hidden=hidden, budget=budget)
    assert sorted(chain.from_iterable(lines)) == list(range(len(rows)))
    for line in ([positions[index] for index in line] for line in lines):
        assert len({rows.prompts[row] for row in line}) == 1
        assert line_length(rows, line) <= max(budget, *(line_length(rows, [row]) for row in line))
    separate = sum(line_length(rows, [row]) for row in positions)
    shared = sum(line_length(rows, [positions[index] for index in line]) for line in lines)
    assert shared <= 0.8 * separate or all(len(line) == 1 for line in lines)
