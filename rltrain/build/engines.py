"""Builds rollout engines. An engine's module is imported only when a recipe names that engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rltrain.build.environment import build_dialogue, build_pool
from rltrain.config.schema import Data, Model, Rollout
from rltrain.data.chat import StopTokens
from rltrain.data.tokenization import Tokenization
from rltrain.process import Process
from rltrain.protocols import RolloutEngine, Sampler
from rltrain.rollout.environments.episodes import EpisodePlayer

__all__ = ["build_engine", "build_sampler", "build_transformers_engine"]


def build_engine(
    model: Model,
    data: Data,
    rollout: Rollout,
    precision: str,
    tokenization: Tokenization,
    process: Process,
) -> RolloutEngine:
    """The engine that ``rollout`` names, without weights.

    precision: the learner's; on a GPU the engine's weights have the same.
    """
    device = process.device
    if rollout.engine == "vllm_server" and rollout.workers is not None:
        from rltrain.build.pool import build_pool_engine

        return build_pool_engine(model, data, rollout, precision, tokenization, process)
    if rollout.engine == "vllm_server":
        from rltrain.build.server import build_server_engine

        return build_server_engine(model, data, rollout, precision, tokenization, process)
    if rollout.engine == "transformers":
        return build_transformers_engine(
            model, precision, tokenization.stop_tokens, tokenization.decode, rollout.max_rows, device
        )

    from rltrain.rollout.engines.vllm.colocated import VllmColocated

    return VllmColocated(
        model.path,
        revision=model.revision,
        stop_token_ids=tokenization.stop_tokens.stop,
        decode=tokenization.decode,
        max_model_len=data.max_prompt_tokens + rollout.max_tokens,
        max_num_seqs=rollout.vllm.max_num_seqs,
        kv_cache_gib=rollout.vllm.kv_cache_gib,
        gpu_memory_utilization=rollout.vllm.utilization_alone,
        dtype=_weights_dtype(precision, device),
        enforce_eager=rollout.vllm.enforce_eager,
        adaptive_temperature=rollout.adaptive_temperature is not None,
        device=device,
        tensor_parallel=rollout.vllm.tensor_parallel,
    )


def build_sampler(data: Data, rollout: Rollout, engine: RolloutEngine, tokenization: Tokenization) -> Sampler:
    """What writes the completions: the engine, or with an environment a player of episodes that calls it."""
    ref = rollout.environment
    if ref is None:
        return engine
    return EpisodePlayer(
        engine,
        build_pool(ref),
        build_dialogue(data, ref, tokenization),
        decode=tokenization.decode,
        filler=tokenization.stop_tokens.pad,
        max_turns=ref.max_turns,
        turn_tokens=ref.turn_tokens,
    )


def build_transformers_engine(
    model: Model,
    precision: str,
    stop_tokens: StopTokens,
    decode: Callable[[Sequence[int]], str],
    max_rows: int,
    device: torch.device,
) -> RolloutEngine:
    """The engine inside this process. max_rows: rows that it decodes at once."""
    from rltrain.rollout.engines.transformers.engine import TransformersEngine

    return TransformersEngine(
        model.path,
        revision=model.revision,
        stop_token_ids=stop_tokens.stop,
        pad_token_id=stop_tokens.pad,
        decode=decode,
        max_rows=max_rows,
        device=device,
        dtype=_weights_dtype(precision, device),
        attention="auto" if model.attention in ("flash_attention_2", "flex_attention") else model.attention,
    )


def _weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" or precision == "float32" else torch.bfloat16
