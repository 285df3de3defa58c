"""How long a row may be, and which tokens it may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rltrain.build.tiny_model import character_tokenizer
from rltrain.config.schema import Model
from rltrain.data.tokenization import tokenization_of
from rltrain.errors import UserError
from rltrain.learner.forward import PolicyForward
from rltrain.learner.loading import load_causal_lm
from rltrain.learner.packing import build
from rltrain.model_limits import Context, context_of, require_context, rotary_limit
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.types.policy import TokenRows
from rltrain.types.samples import Prompt, Sampling
from rltrain.weight_names import CheckpointNames
from support.architectures import CONTEXT, ORIGINAL_CONTEXT, tiny

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0, "rope_theta": 1e4}


def config(kind: str, **changes: Any) -> Any:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return AutoConfig.for_model(kind, **{**sizes, **changes})


def long_rope(original: int) -> dict[str, Any]:
    return {**FACTORS, "rope_type": "longrope", "original_max_position_embeddings": original}


def tokens_of(context: Context | None) -> int | None:
    return None if context is None else context.tokens


@pytest.mark.parametrize(
    ("model_config", "rotary", "context"),
    [
        (config("llama"), None, 64),
        (config("llama", rope_parameters=long_rope(24)), 24, 24),
        (config("phi3", rope_parameters=long_rope(24), original_max_position_embeddings=24), 24, 24),
        (
            config("phi3", rope_scaling=long_rope(24), original_max_position_embeddings=24),
            24,
            24,
        ),  # as older folders have it
        (config("llama", rope_parameters=long_rope(64)), 64, 64),
        (config("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), 64, 64),
        (
            config("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
            None,
            64,
        ),
        (
            config(
                "llama",
                rope_parameters={**FACTORS, "rope_type": "yarn", "original_max_position_embeddings": 16},
            ),
            None,
            64,
        ),
        (
            config(
                "gemma3_text",
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                },
            ),
            64,
            64,
        ),
        (AutoConfig.for_model("mamba"), None, None),
        (AutoConfig.for_model("bloom"), None, None),
        (AutoConfig.for_model("gpt2", n_positions=48), None, 48),
    ],
)
def test_the_context_ends_where_rotary_frequencies_change(
    model_config: Any, rotary: int | None, context: int | None
) -> None:
    assert tokens_of(rotary_limit(model_config)) == rotary
    assert tokens_of(context_of(model_config)) == context


def test_sizes_that_do_not_fit_are_named_with_the_limit_and_its_reason() -> None:
    model_config = config("phi3", rope_parameters=long_rope(24), original_max_position_embeddings=24)
    require_context(model_config, "phi", {"data.max_prompt_tokens": 16, "rollout.max_tokens": 8})
    with pytest.raises(
        UserError,
        match=r"max_prompt_tokens 16 \+ rollout.max_tokens 9 = 25 .* reads at most 24 .*rope_type longrope",
    ):
        require_context(model_config, "phi", {"data.max_prompt_tokens": 16, "rollout.max_tokens": 9})


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny("phi3_longrope", tmp_path_factory.mktemp("longrope") / "model"))


def test_no_row_longer_than_the_original_context_reaches_the_model(longrope: str) -> None:
    model = load_causal_lm(longrope, None, "auto")
    rows = TokenRows(((5, 6, 7), (5,)), ((8, 9), tuple(range(5, 5 + ORIGINAL_CONTEXT))))
    together = build(rows, [0, 1], layout="padded")
    single = build(rows, [0], layout="padded")
    wants: Any = {"temperature": 1.0, "wants": frozenset({"logp"}), "chunk": 4096}

    at_the_limit = PolicyForward(model)(together, **wants)["logp"]  # 16 tokens are read
    torch.testing.assert_close(
        at_the_limit[0, :2], PolicyForward(model)(single, **wants)["logp"][0], atol=1e-5, rtol=0
    )

    longer = TokenRows(rows.prompts, (rows.completions[0], (*rows.completions[1], 5)))
    with pytest.raises(
        ValueError, match=f"a row of {ORIGINAL_CONTEXT + 1} tokens .* at most {ORIGINAL_CONTEXT}"
    ):
        PolicyForward(model)(build(longer, [0, 1], layout="padded"), **wants)


def test_what_the_limit_is_for(longrope: str) -> None:
    # Without it, a neighbour one token past the original context moves a short row's log-probs by far more
    # than rounding.
    policy = PolicyForward(load_causal_lm(longrope, None, "auto")).eval()
    policy._rotary = None
    rows = TokenRows(((5, 6, 7), (5,)), ((8, 9), tuple(range(5, 6 + ORIGINAL_CONTEXT))))
    wants: Any = {"temperature": 1.0, "wants": frozenset({"logp"}), "chunk": 4096}
    with torch.no_grad():
        single = policy(build(rows, [0], layout="padded"), **wants)["logp"][0]
        together = policy(build(rows, [0, 1], layout="padded"), **wants)["logp"][0, :2]
    assert (single - together).abs().max() > 0.01


def test_the_embedded_engine_decodes_up_to_the_original_context(longrope: str) -> None:
    engine = TransformersEngine(longrope, stop_token_ids=[1], pad_token_id=0, decode=lambda _: "", max_rows=2)
    model = load_causal_lm(longrope, None, "auto")
    engine.load(CheckpointNames(model).to_checkpoint(model.state_dict().items()), 0)
    prompt = Prompt("a", tuple(range(5, 13)), "")
    sample_groups(engine, [prompt], Sampling(n=1, temperature=1.0, max_tokens=8, seed=0), 0)
    with pytest.raises(ValueError, match=r"together over the 16 of .*rope_type longrope"):
        sample_groups(engine, [prompt], Sampling(n=1, temperature=1.0, max_tokens=9, seed=0), 0)


# tokens -----------------------------------------------------------------------------------------------------


def enlarged(out: Path, *tokens: str, special: bool) -> str:
    """A model whose tokenizer gained tokens and whose embedding did not."""
    tiny("qwen2", out)
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(out)
    return str(out)


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    model = enlarged(tmp_path / "model", "<think>", "</think>", special=False)
    with pytest.raises(
        UserError,
        match="tokenizer has 103 tokens and its embedding 101 rows, so 2 tokens have none, first '<think>'",
    ):
        tokenization_of(Model(path=model), {})


def test_special_tokens_without_an_embedding_are_refused_where_a_text_holds_one(tmp_path: Path) -> None:
    language = tokenization_of(Model(path=enlarged(tmp_path / "model", "<image>", special=True)), {})
    harmless, harmful = (tuple(language.tokenizer(text)["input_ids"]) for text in ("1+1=", "1+<image>="))
    language.require_embedded([("prompt a", harmless), ("prompt b", ())])
    with pytest.raises(
        UserError,
        match=r"prompt b holds token 101 \('<image>'\), but the embedding of the model has 101 rows",
    ):
        language.require_embedded([("prompt a", harmless), ("prompt b", harmful)])


def test_an_embedding_with_rows_to_spare_is_taken(tmp_path: Path) -> None:
    tiny("qwen2", tmp_path / "model")
    config_ = AutoConfig.from_pretrained(tmp_path / "model")
    config_.vocab_size = 128  # as many models round it up
    config_.save_pretrained(tmp_path / "model")
    assert (
        tokenization_of(Model(path=str(tmp_path / "model")), {"data.max_prompt_tokens": CONTEXT}).vocabulary
        == 128
    )
