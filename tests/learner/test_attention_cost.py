"""When a shared prompt pays on a GPU, as a table; and which call of attention a micro-batch makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from rltrain.learner.attention_cost import layer_cost, sharing_pays
from rltrain.learner.forward import PolicyForward
from rltrain.learner.packing import MicroBatch, build
from rltrain.learner.shared_prompt import build_shared
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


def test_plain_rows_take_the_causal_kernel_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask a GPU has no flash attention, and keys are repeated for every head that reads them."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    policy = PolicyForward(Qwen2ForCausalLM(config))
    calls: list[tuple[Any, bool, int]] = []
    attend = functional.scaled_dot_product_attention

    def record(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        shape = None if attn_mask is None else tuple(attn_mask.shape)
        calls.append((shape, options.get("is_causal", False), key.shape[1]))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    rows = TokenRows(((1, 2, 3),) * 2, ((4, 5), (6, 7, 8)))

    def run(batch: MicroBatch) -> None:
        policy(batch, temperature=1.0, wants=frozenset({"logp"}), chunk=64)

    with torch.no_grad():
        run(build(rows, [0, 1], layout="padded"))
        run(build_shared(rows, [[0, 1]]))
    assert calls == [(None, True, 2), ((1, 1, 6, 6), False, 4)]
