"""Builds rollout engines. An engine's module is imported only when a recipe names that engine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from rltrain.build.environment import build_dialogue, build_pool
from rltrain.checkpoint.tensor_files import write_tensors
from rltrain.config.schema import Data, Model, Rollout
from rltrain.data.chat import StopTokens
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError
from rltrain.learner.trained_model import TrainedModel
from rltrain.model_files import config_source
from rltrain.process import Process
from rltrain.protocols import RolloutEngine, Sampler
from rltrain.remote_code import trust_copy, trusts
from rltrain.rollout.environments.episodes import EpisodePlayer

__all__ = ["build_engine", "build_sampler", "build_transformers_engine", "engine_base"]


def build_engine(
    model: Model,
    data: Data,
    rollout: Rollout,
    precision: str,
    tokenization: Tokenization,
    process: Process,
    *,
    truncation: bool = False,
) -> RolloutEngine:
    """The engine that ``rollout`` names, without weights.

    precision: the learner's; the engine's weights follow it (``weights_dtype``). truncation: evaluations
    truncate their sampling.
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
        dtype=weights_dtype(precision, device),
        enforce_eager=rollout.vllm.enforce_eager,
        adaptive_temperature=rollout.adaptive_temperature is not None,
        truncation=truncation or rollout.truncates,
        device=device,
        tensor_parallel=rollout.vllm.tensor_parallel,
        adapter_rank=None if model.adapter is None else model.adapter.rank,
    )


@contextlib.contextmanager
def engine_base(model: Model, rollout: Rollout, trained: TrainedModel, process: Process) -> Iterator[Model]:
    """The model that the engine starts with: the recipe's, or while the block lasts a copy of the base that
    the learner computes with, where an adapter's base was quantised or rounded after it was read.

    The copy is in the engine's precision, in one folder of each node. A collective.
    """
    dtype = weights_dtype(trained.settings.precision, process.device)
    adapter = trained.adapter
    is_own = adapter is not None and (
        adapter.settings.quantize != "none" or trained.compute_dtype.itemsize < dtype.itemsize
    )
    if rollout.engine == "transformers" or not is_own:
        yield model
        return
    if rollout.engine == "vllm_server" and (rollout.server.url or rollout.workers):
        raise UserError(
            "model.adapter: the learner's base is not the model's files in the engine's precision (it was "
            "quantised, or rounded by learner.precision), and the copy that the engine reads lasts on this "
            "machine until the run's own worker has started; leave rollout.workers and rollout.server.url "
            "out, or set learner.precision to float32 and quantize to none"
        )
    name = trained.broadcast(f"rltrain-base-{secrets.token_hex(8)}")
    folder = Path(tempfile.gettempdir()) / name
    is_writer = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        weights = ((key, weight.to(dtype)) for key, weight in trained.base_weights(dtype))
        if is_writer:
            folder.mkdir(mode=0o700)
            source, revision = config_source(model.path, model.revision)
            trust = trusts(source, revision)
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
            config.save_pretrained(folder)
            trust_copy(folder, source, revision)
            write_tensors(folder, "model", weights)
        else:
            for _ in weights:  # gathering is a collective
                pass
        trained.gather([name])  # the folder is complete
        yield model.model_copy(update={"path": str(folder), "revision": None})
        trained.gather([name])  # every rank has read it
    finally:
        if is_writer:
            shutil.rmtree(folder, ignore_errors=True)


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
        dtype=weights_dtype(precision, device),
        attention="auto" if model.attention in ("flash_attention_2", "flex_attention") else model.attention,
    )


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of an engine's weights: the learner's precision, with bfloat16 for float16. On a CPU, which may have no
    products of bfloat16, only where the recipe asks for it.
    """
    lowered = precision == "bfloat16" if device.type == "cpu" else precision != "float32"
    return torch.bfloat16 if lowered else torch.float32
