"""Continuous batching: results that no batch composition changes, and models the cache would decode
wrongly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
)

from rltrain.errors import UserError
from rltrain.rollout.engines.transformers import engine as engine_module
from rltrain.rollout.engines.transformers.engine import TransformersEngine
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import Completion, Prompt, RolloutGroup, Sampling

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
STOP = {1, 2, 3}
PROMPTS = [
    Prompt(f"p{index}", tuple(range(4, 4 + length)), "")
    for index, length in enumerate((3, 17, 1, 9, 5, 30, 2))
]


def engine_of(folder: Path, **options: Any) -> TransformersEngine:
    settings: dict[str, Any] = {
        "stop_token_ids": STOP,
        "pad_token_id": 0,
        "decode": lambda ids: "",
        "max_rows": 8,
    } | options
    return TransformersEngine(str(folder), **settings)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2ForCausalLM]:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.3)).eval()
    folder = tmp_path_factory.mktemp("qwen")
    model.config.save_pretrained(folder)  # no weights in the folder: they arrive by load
    return folder, model


@pytest.fixture
def generate(qwen: tuple[Path, Qwen2ForCausalLM]) -> Callable[..., list[RolloutGroup]]:
    folder, model = qwen

    def run(sampling: Sampling, prompts: list[Prompt] = PROMPTS, **options: Any) -> list[RolloutGroup]:
        engine = engine_of(folder, **options)
        engine.load(model.named_parameters(), 0)
        return sample_groups(engine, prompts, sampling, 0)

    return run


def rows(groups: list[RolloutGroup]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def test_no_batch_composition_changes_a_completion(generate: Callable[..., list[RolloutGroup]]) -> None:
    # 42 completions, most stopped early by 3 of 64 ids: with 1, 3 or 8 slots rows enter, leave and are moved
    # all the time
    sampling = Sampling(6, 1.0, 70, seed=3)
    together = rows(generate(sampling, max_rows=64))
    assert len({len(completion.token_ids) for completion in together}) > 10
    for max_rows in (1, 3, 8):
        some = rows(generate(sampling, max_rows=max_rows))
        assert [completion.token_ids for completion in some] == [
            completion.token_ids for completion in together
        ]
        for completion, other in zip(some, together, strict=True):
            torch.testing.assert_close(completion.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_a_shared_prefill_gives_what_separate_ones_give(generate: Callable[..., list[RolloutGroup]]) -> None:
    shared = generate(Sampling(4, 1.0, 20, seed=3))
    for index, prompt in enumerate(PROMPTS):
        few = generate(Sampling(2, 1.0, 20, seed=3), prompts=[prompt])
        assert [completion.token_ids for completion in rows(few)] == [
            completion.token_ids for completion in shared[index].completions[:2]
        ]


def test_every_unique_prompt_is_prefilled_once(qwen: tuple[Path, Qwen2ForCausalLM]) -> None:
    engine = engine_of(qwen[0], max_rows=5)  # 4 completions per prompt do not divide 5 slots
    engine.load(qwen[1].named_parameters(), 0)
    prefilled: Counter[tuple[int, ...]] = Counter()
    prefill = engine._prefill
    engine._prefill = lambda prompts: (prefilled.update(map(tuple, prompts)), prefill(prompts))[1]  # type: ignore[method-assign]
    sample_groups(engine, PROMPTS, Sampling(4, 1.0, 20, seed=3), 0)
    assert prefilled == Counter({prompt.token_ids: 1 for prompt in PROMPTS})


def test_eager_and_grouped_sdpa_attention_agree(generate: Callable[..., list[RolloutGroup]]) -> None:
    sdpa_rows, eager_rows = (
        rows(generate(Sampling(3, 1.0, 40, seed=3), attention=name)) for name in ("sdpa", "eager")
    )
    assert [row.token_ids for row in sdpa_rows] == [row.token_ids for row in eager_rows]


def test_bfloat16_logprobs_stay_near_float32(
    generate: Callable[..., list[RolloutGroup]], qwen: tuple[Path, Qwen2ForCausalLM]
) -> None:
    # bfloat16 keeps 8 bits: logits of up to 20 are off by up to 20 / 256 = 0.08 in the head alone
    differences = []
    for group in generate(Sampling(2, 1.0, 10, seed=3), dtype=torch.bfloat16):
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            logp = torch.log_softmax(qwen[1](ids).logits[0, len(group.prompt.token_ids) - 1 : -1], dim=-1)
            differences.append(
                logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                - torch.tensor(completion.logprobs)
            )
    assert 1e-4 < torch.cat(differences).abs().mean() < 0.15


def test_weights_that_are_not_finite_stop_the_run(qwen: tuple[Path, Qwen2ForCausalLM]) -> None:
    engine = engine_of(qwen[0])
    engine.load(
        ((name, torch.full_like(weight, float("nan"))) for name, weight in qwen[1].named_parameters()), 7
    )
    with pytest.raises(FloatingPointError, match="version 7"):
        sample_groups(engine, PROMPTS, Sampling(1, 1.0, 4, seed=3), 7)


def test_a_row_may_fill_the_context_but_not_exceed_it(generate: Callable[..., list[RolloutGroup]]) -> None:
    full = generate(Sampling(1, 1.0, 98, seed=3), prompts=[PROMPTS[5]], stop_token_ids=[])  # 30 + 98 = 128
    assert len(full[0].completions[0].token_ids) == 98
    with pytest.raises(ValueError, match=r"30 tokens.*99.*128"):
        generate(Sampling(1, 1.0, 99, seed=3), prompts=[PROMPTS[5]])


def test_recurrent_layers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    Qwen3NextConfig(**SIZES, head_dim=16, num_experts=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"linear_attention layers.*rollout.engine vllm"):
        engine_of(tmp_path)


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SIZES, logits_scaling=8.0), CohereConfig(**SIZES, logit_scale=0.1)]
)
def test_a_model_that_it_would_decode_wrongly_is_refused_with_the_remedy(
    config: PreTrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save_pretrained(tmp_path)
    assert engine_of(tmp_path).version is None
    monkeypatch.setattr(engine_module, "head_scales", lambda model: (1.0, 1.0))
    with pytest.raises(UserError, match=r"differs from the model's plain forward.*rollout.engine vllm"):
        engine_of(tmp_path)


def test_other_architectures_pass_the_check(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert engine_of(tmp_path).version is None


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    MistralConfig(**SIZES, sliding_window=24).save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    engine.load([(name, weight) for name, weight in engine._model.named_parameters()], 0)
    assert len(sample_groups(engine, PROMPTS[:1], Sampling(1, 1.0, 21, seed=0), 0)) == 1  # 3 + 21 = 24
    with pytest.raises(ValueError, match="24 of the sliding window"):
        sample_groups(engine, PROMPTS[:1], Sampling(1, 1.0, 22, seed=0), 0)


def test_settings_that_cannot_work_are_refused(qwen: tuple[Path, Qwen2ForCausalLM]) -> None:
    with pytest.raises(ValueError, match="flash_attention_2"):
        engine_of(qwen[0], attention="flash_attention_2")
    with pytest.raises(ValueError, match="max_rows is 0"):
        engine_of(qwen[0], max_rows=0)
    with pytest.raises(ValueError, match="temperature"):
        engine = engine_of(qwen[0])
        engine.load(qwen[1].named_parameters(), 0)
        sample_groups(engine, PROMPTS, Sampling(1, -1.0, 4, seed=0), 0)
