"""Micro-batches: every row once, none over budget, and statistics from the right hidden state."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.learner.packing import Layout, build, plan
from rltrain.types.policy import TokenRows

# Row 0: prompt 10 11, completion 12 13 14. Row 1: prompt 20, completion 21. Row 2: prompt 30 31 32, no
# completion.
ROWS = TokenRows(prompts=((10, 11), (20,), (30, 31, 32)), completions=((12, 13, 14), (21,), ()))


def test_padded_rows_by_hand() -> None:
    micro_batch = build(ROWS, [2, 0, 1], layout="padded")
    # The last completion token is not read. Row 0 reads 10 11 12 13, the longest; hidden states are numbered
    # 4 row + place.
    assert micro_batch.input_ids.tolist() == [[30, 31, 32, 0], [10, 11, 12, 13], [20, 0, 0, 0]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert micro_batch.attention_mask is None
    # Token 12 is predicted at place 1 (token 11) of the second row: 4 + 1; 13 and 14 follow; 21 at place 0 of
    # the third: 8.
    assert micro_batch.index.tolist() == [5, 6, 7, 8]
    assert micro_batch.targets.tolist() == [12, 13, 14, 21]
    assert micro_batch.row.tolist() == [1, 1, 1, 2] and micro_batch.column.tolist() == [0, 1, 2, 0]
    assert micro_batch.rows.tolist() == [2, 0, 1] and micro_batch.width == 3


def test_packed_rows_by_hand() -> None:
    micro_batch = build(ROWS, [2, 0, 1], layout="packed")
    assert micro_batch.input_ids.tolist() == [[30, 31, 32, 10, 11, 12, 13, 20]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert micro_batch.index.tolist() == [4, 5, 6, 7]
    assert micro_batch.targets.tolist() == [12, 13, 14, 21]


def test_left_padded_rows_by_hand() -> None:
    micro_batch = build(ROWS, [0, 1], layout="padded", padding_side="left")
    assert micro_batch.input_ids.tolist() == [[10, 11, 12, 13], [0, 0, 0, 20]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert micro_batch.attention_mask is not None and micro_batch.attention_mask.tolist() == [
        [1, 1, 1, 1],
        [0, 0, 0, 1],
    ]
    assert micro_batch.index.tolist() == [1, 2, 3, 7]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_rows_still_read_one_token(layout: Layout) -> None:
    micro_batch = build(ROWS, [], layout=layout)
    assert micro_batch.input_ids.shape == (1, 1)
    assert micro_batch.rows.numel() == micro_batch.index.numel() == micro_batch.targets.numel() == 0
    assert micro_batch.width == 1


def test_an_empty_prompt_is_refused_by_its_position() -> None:
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        build(TokenRows(prompts=((1,), ()), completions=((2,), (3,))), [0, 1], layout="padded")


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(["padded", "packed"]),
)
def test_every_row_once_within_the_budget_and_equally_many_micro_batches(
    lengths: list[int], budget: int, ranks: int, layout: Layout
) -> None:
    planned = plan(lengths, budget, layout=layout, ranks=ranks)
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1
    assert sorted(row for rank in planned for rows in rank for row in rows) == list(range(len(lengths)))
    for rows in (rows for rank in planned for rows in rank):
        read = [lengths[row] for row in rows]
        cost = sum(read) if layout == "packed" else len(read) * max(read, default=0)
        assert cost <= budget or len(read) == 1
    assert planned == plan(lengths, budget, layout=layout, ranks=ranks)


def test_equal_rows_are_spread_evenly_instead_of_filling_the_first_micro_batches() -> None:
    # 10 rows of 10 tokens, budget 40: at least 3 micro-batches. 4, 4, 2 rows would fit too; 4, 3, 3 is the
    # even split of packed.
    assert [len(rows) for rows in plan([10] * 10, 40, layout="packed")[0]] == [4, 3, 3]


def test_ranks_share_what_would_fit_one_micro_batch() -> None:
    # 8 rows of 10 tokens fit one budget of 100; with two ranks each takes 4 rows rather than one taking all.
    for layout in ("padded", "packed"):
        planned = plan([10] * 8, 100, layout=layout, ranks=2)  # type: ignore[arg-type]
        assert [[len(rows) for rows in rank] for rank in planned] == [[4], [4]]


def test_a_rank_without_rows_gets_an_empty_micro_batch() -> None:
    assert plan([7], 100, layout="padded", ranks=3) == [[[0]], [[]], [[]]]


def test_padded_micro_batches_hold_rows_of_like_length() -> None:
    # Half the rows have 10 tokens, half 100; budget 1,000. Mixed, a micro-batch would be nine parts padding
    # for the short ones.
    lengths = [10, 100] * 20
    planned = plan(lengths, 1000, layout="padded")[0]
    read = sum(len(rows) * max(lengths[row] for row in rows) for rows in planned)
    assert read <= 1.25 * sum(lengths)


def test_packed_ranks_differ_by_less_than_one_row() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 300) for _ in range(200)]
    sums = [
        sum(lengths[row] for rows in rank for row in rows)
        for rank in plan(lengths, 2048, layout="packed", ranks=4)
    ]
    assert max(sums) - min(sums) < 300


def test_a_budget_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="token budget is 0"):
        plan([1], 0, layout="padded")


def test_moving_keeps_every_number() -> None:
    micro_batch = build(ROWS, [0, 1], layout="padded", padding_side="left")
    moved = micro_batch.to("cpu")
    assert torch.equal(moved.index, micro_batch.index)
    assert moved.width == micro_batch.width
    assert moved.attention_mask is not None
