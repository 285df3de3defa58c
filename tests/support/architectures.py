"""Tiny random models of many architectures, with the tiny models' character tokenizer, for tests of what must
hold for all of them.

Widths are as small as each architecture allows; weights are drawn wide (0.1), so that a wrong position, a
missing scale or a dropout moves log-probs by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from rltrain.build.tiny_model import character_tokenizer

CONTEXT = 256
ORIGINAL_CONTEXT = 16  # of the model with LongRoPE
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.1}
_BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
_HALF = 16  # rotary frequencies of a head of 32
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}


@dataclass(frozen=True)
class Architecture:
    """What makes a tiny model of one architecture."""

    family: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: _LLAMA)
    vision: Mapping[str, Any] | None = (
        None  # of a model of images and text, whose language model all else describes
    )
    dtype: torch.dtype = torch.float32  # of the weights in the folder


def _of(family: str, model_type: str, base: Mapping[str, Any] = _LLAMA, **changes: Any) -> Architecture:
    return Architecture(family, model_type, changes, base)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _of("dense", "llama"),
    "qwen2": _of("dense", "qwen2"),
    "qwen3": _of("dense", "qwen3", head_dim=32),
    "smollm3": _of("dense", "smollm3"),
    "phi": _of("dense", "phi"),
    "gpt2": _of("dense", "gpt2", _GPT2),
    "gptj": _of("dense", "gptj", _GPT2, rotary_dim=16, tie_word_embeddings=False),
    "gpt_neox": _of("dense", "gpt_neox", num_key_value_heads=2),
    "opt": _of("dense", "opt", ffn_dim=96, word_embed_proj_dim=64, init_std=0.1),
    "bloom": _of("dense", "bloom", _BLOOM),
    "falcon": _of("dense", "falcon", {**_LLAMA, "num_key_value_heads": None}),
    "granite": _of(
        "dense",
        "granite",
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.06,
    ),
    "cohere": _of("dense", "cohere", logit_scale=0.0625),
    "starcoder2": _of(
        "dense", "starcoder2", attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1
    ),
    "llama_bfloat16": Architecture("dense", "llama", dtype=torch.bfloat16),
    "qwen2_tied": _of("tied", "qwen2", tie_word_embeddings=True),
    "mistral": _of("sliding window", "mistral", sliding_window=24),
    "gemma2": _of("sliding window", "gemma2", head_dim=32, sliding_window=24, query_pre_attn_scalar=32),
    "gemma2_no_cap": _of(
        "sliding window",
        "gemma2",
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=32,
        final_logit_softcapping=None,
    ),
    "gemma3_text": _of(
        "sliding window", "gemma3_text", head_dim=32, sliding_window=24, query_pre_attn_scalar=32
    ),
    "cohere2": _of("sliding window", "cohere2", logit_scale=0.25, sliding_window=24, head_dim=32),
    "exaone4": _of("sliding window", "exaone4", sliding_window=24, head_dim=32),
    "deepseek_v3": _of(
        "MLA",
        "deepseek_v3",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=48,
        n_shared_experts=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
    ),
    "minicpm3": _of(
        "MLA",
        "minicpm3",
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        dim_model_base=32,
    ),
    "mixtral": _of("mixture of experts", "mixtral", **_EXPERTS, output_router_logits=False),
    "mixtral_router_loss": _of("mixture of experts", "mixtral", **_EXPERTS, output_router_logits=True),
    "mixtral_jitter": _of("mixture of experts", "mixtral", **_EXPERTS, router_jitter_noise=0.1),
    "qwen3_moe": _of(
        "mixture of experts", "qwen3_moe", **_EXPERTS, head_dim=32, decoder_sparse_step=1, norm_topk_prob=True
    ),
    "olmoe": _of("mixture of experts", "olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": _of("mixture of experts", "phimoe", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _of(
        "mixture of experts",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=32,
        sliding_window=24,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mamba": _of("recurrent", "mamba", _SMALL),
    "mamba2": _of(
        "recurrent", "mamba2", {**_SMALL, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}
    ),
    "jamba": _of(
        "hybrid",
        "jamba",
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "lfm2": _of("hybrid", "lfm2", layer_types=["conv", "full_attention"]),
    "gemma3": Architecture(
        "images and text",
        "gemma3",
        {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "qwen2_vl": Architecture(
        "images and text",
        "qwen2_vl",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}},
        vision={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
    ),
    "llama_dynamic": _of("rotary scaling", "llama", rope_parameters={**_ROPE, "rope_type": "dynamic"}),
    "llama_yarn": _of(
        "rotary scaling",
        "llama",
        rope_parameters={**_ROPE, "rope_type": "yarn", "original_max_position_embeddings": 64},
    ),
    "llama3": _of(
        "rotary scaling",
        "llama",
        rope_parameters={
            **_ROPE,
            "rope_type": "llama3",
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "phi3_longrope": _of(
        "rotary scaling",
        "phi3",
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        rope_parameters={
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * _HALF,
            "long_factor": [4.0] * _HALF,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        },
    ),
}


def tiny(name: str, out: Path) -> Path:
    """The folder ``out`` with a random model of ``ARCHITECTURES[name]`` and its tokenizer."""
    chosen, tokenizer = ARCHITECTURES[name], character_tokenizer()
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    language = {"vocab_size": len(tokenizer), **ids, **chosen.base, **chosen.changes}
    both = (
        language if chosen.vision is None else {"text_config": language, "vision_config": dict(chosen.vision)}
    )
    config = AutoConfig.for_model(chosen.model_type, **both)
    kind = AutoModelForImageTextToText if chosen.vision is not None else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config).to(chosen.dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
