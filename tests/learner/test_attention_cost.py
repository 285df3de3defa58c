"""When a shared prompt pays on a GPU, as a table."""

from __future__ import annotations

import pytest

from rltrain.learner.attention_cost import layer_cost, sharing_pays
from rltrain.types.policy import TokenRows


def pairs_of(prompt: int, completion: int, count: int = 2) -> tuple[TokenRows, list[tuple[int, int]]]:
    prompts = tuple((pair,) * prompt for pair in range(count))
    rows = TokenRows(prompts * 2, tuple((1,) * completion for _ in range(2 * count)))
    return rows, [(pair, count + pair) for pair in range(count)]


@pytest.mark.parametrize(
    ("prompt", "completion", "hidden", "pays"),
    [
        (512, 512, 3584, True),
        (256, 512, 3584, True),
        (1024, 128, 3584, True),
        (1024, 2048, 3584, False),
        (1024, 4096, 3584, False),
        (1024, 8192, 3584, False),  # a mask of 303 MB in place of the causal kernel
        (512, 512, 768, False),  # in a small model attention weighs more
        (4096, 256, 3584, True),
    ],
)
def test_pairs_share_their_prompt_only_where_that_takes_less_time(
    prompt: int, completion: int, hidden: int, pays: bool
) -> None:
    rows, pairs = pairs_of(prompt, completion)
    assert sharing_pays(rows, pairs, hidden=hidden) is pays


def test_a_cost_by_hand() -> None:
    # H 10: a row of 3 and a masked line of 5 tokens. Products 24 x 100 x 8 / 0.66, causal 2 x 10 x 9 / 0.45,
    # masked 4 x 10 x 25 / 0.18.
    assert layer_cost(10, [3], [5]) == pytest.approx(29090.909 + 400 + 5555.556, abs=0.01)


def test_rows_alone_cost_the_same_either_way() -> None:
    rows, pairs = pairs_of(64, 8)
    assert not sharing_pays(rows, [[row] for pair in pairs for row in pair], hidden=512)
