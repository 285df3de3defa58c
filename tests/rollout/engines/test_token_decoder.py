"""The short form of a decode step gives what the model's own modules give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rltrain.rollout.engines.transformers.kv_cache import DecodeCache, layers_of
from rltrain.rollout.engines.transformers.token_decoder import LLAMA_LIKE, TokenDecoder, place_together

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (3, 9, 5)
VARIANTS = [
    *((kind, {}) for kind in LLAMA_LIKE),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 16, "num_key_value_heads": 1}),  # 4 heads of 16 are wider than the hidden states
    ("qwen3", {"head_dim": 8, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
]


def model_of(kind: str, **changes: Any) -> Any:
    """Random in float32; no weight is left at 0 or 1."""
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def decoded(model: Any, steps: int) -> list[Tensor]:
    """(3, H) hidden states of each step, by the short form, of rows of three lengths that go on from
    their prompts.
    """
    rows = [[(5 * row + 3 * place) % 64 for place in range(length)] for row, length in enumerate(LENGTHS)]
    prefill, cache = DynamicCache(), DecodeCache(3, 16)
    padded = torch.tensor([row + [0] * (max(LENGTHS) - len(row)) for row in rows])
    model.base_model(input_ids=padded, past_key_values=prefill, use_cache=True)
    cache.admit(layers_of(prefill), torch.arange(3), start=0)
    hidden_states, decoder = [], TokenDecoder(model)
    for step in range(steps):
        positions = torch.tensor(LENGTHS) + step
        columns = int(positions.max()) + 1
        cache.begin_step(positions, columns)
        beyond = torch.arange(columns) > positions[:, None]
        mask = torch.zeros(3, columns).masked_fill_(beyond, float("-inf"))[:, None, None]
        hidden_states.append(decoder(torch.tensor([7, 8, 9]) + step, positions, mask, cache))
    return hidden_states


def alone(model: Any, steps: int) -> list[Tensor]:
    """The same by the model's own forward over each whole row."""
    rows = [[(5 * row + 3 * place) % 64 for place in range(length)] for row, length in enumerate(LENGTHS)]
    complete_rows = [row + [7 + number + step for step in range(steps)] for number, row in enumerate(rows)]
    hidden = [
        model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0, -steps:]
        for row in complete_rows
    ]
    return list(torch.stack(hidden, dim=1))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_every_step_gives_what_the_models_own_forward_gives(
    kind: str, changes: dict[str, Any], together: bool
) -> None:
    model = model_of(kind, **changes)
    if together:
        place(model, keep=True)
    assert TokenDecoder.fits(model)
    with torch.inference_mode():
        for ours, expected in zip(decoded(model, 3), alone(model, 3), strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def place(model: Any, *, keep: bool) -> None:
    parameters = list(model.parameters())
    place_together(parameters, [parameter.shape for parameter in parameters], keep=keep)


def test_weights_that_stand_together_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Queries, keys and values; gate and up: 48 x 48, 24 x 48, 24 x 48 and 80 x 48 entries, all multiples of
    # 64.
    widths: list[int] = []
    model, linear = model_of("llama"), F.linear
    monkeypatch.setattr(
        F,
        "linear",
        lambda values, weight, bias=None: widths.append(weight.shape[0]) or linear(values, weight, bias),
    )
    with torch.inference_mode():
        decoded(model, 1)
        apart, widths[:] = widths[-14:], []
        place(model, keep=True)
        decoded(model, 1)
    assert apart == [48, 24, 24, 48, 80, 80, 48] * 2 and widths[-8:] == [96, 48, 160, 48] * 2


def test_weights_whose_neighbour_moved_away_are_read_where_they_are() -> None:
    model = model_of("llama")
    place(model, keep=True)
    up = model.model.layers[0].mlp.up_proj.weight
    up.data = 2 * up.data
    with torch.inference_mode():
        for ours, expected in zip(decoded(model, 2), alone(model, 2), strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_weights_that_got_other_data_are_used() -> None:
    # The engine frees its weights while it sleeps and fills new ones.
    model = model_of("qwen3", head_dim=12)

    def run() -> Tensor:
        cache = DecodeCache(1, 4)
        cache.keys, cache.values = ([torch.zeros(1, 4, 2, 12) for _ in range(2)] for _ in range(2))
        cache.begin_step(torch.tensor([0]), 1)
        return TokenDecoder(model)(torch.tensor([5]), torch.tensor([0]), None, cache)

    with torch.inference_mode():
        before = run()
        for parameter in model.parameters():
            parameter.data = 1.5 * parameter.data
        after = run()
        expected = model.base_model(input_ids=torch.tensor([[5]]), use_cache=False).last_hidden_state[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {"hidden_act": "gelu"}), ("granite", {}), ("cohere", {}), ("olmo2", {})]
)
def test_other_models_keep_their_own_forward(kind: str, changes: dict[str, Any]) -> None:
    assert not TokenDecoder.fits(model_of(kind, **changes))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=str)
def test_prompts_are_read_as_the_models_own_forward_reads_them(kind: str, changes: dict[str, Any]) -> None:
    model, lengths = model_of(kind, **changes), torch.tensor(LENGTHS)
    place(model, keep=True)
    ids = torch.randint(1, 64, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    written = torch.arange(max(LENGTHS)) < lengths[:, None]
    with torch.inference_mode():
        hidden, layers = TokenDecoder(model).read(ids * written)
        for row, length in enumerate(LENGTHS):
            cache = DynamicCache()
            expected = model.base_model(
                input_ids=ids[row : row + 1, :length], past_key_values=cache, use_cache=True
            ).last_hidden_state
            torch.testing.assert_close(hidden[row, :length], expected[0], rtol=2e-5, atol=2e-5)
            for ours, expected_layer in zip(layers, layers_of(cache), strict=True):
                torch.testing.assert_close(
                    [part[row, :length] for part in ours],
                    [part[0] for part in expected_layer],
                    rtol=2e-5,
                    atol=2e-5,
                )
