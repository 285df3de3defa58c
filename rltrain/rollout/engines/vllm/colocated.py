"""vLLM inside the learner's process: on a GPU it sleeps while the learner works; on a CPU it runs the same
code as on a GPU.

``process.py`` undoes what the start of vLLM changes in the process, and ``layers.py`` reads the weights that
vLLM computes with, by checkpoint name.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rltrain.adapter_files import write_adapter
from rltrain.errors import UserError
from rltrain.model_files import config_source
from rltrain.protocols import EngineState
from rltrain.remote_code import trusts
from rltrain.rollout.engines.checks import WeightShapes, require_fit, require_version
from rltrain.rollout.engines.vllm.adapter import adapter_fingerprints, adapter_options
from rltrain.rollout.engines.vllm.config_folder import config_folder
from rltrain.rollout.engines.vllm.layers import (
    Architecture,
    Place,
    Places,
    find_places,
    layer_fingerprints,
    layer_products,
)
from rltrain.rollout.engines.vllm.packing import abandon_reload, pack_experts_on_reload, repack_heads
from rltrain.rollout.engines.vllm.process import (
    ClassStates,
    class_states,
    import_vllm,
    kept_process_group,
    own_shared_memory,
    restore_classes,
    unchanged_process,
)
from rltrain.rollout.engines.vllm.shares import Product
from rltrain.rollout.engines.vllm.tensor_parallel import EngineRanks, find_undividable, require_ranks
from rltrain.rollout.truncation import cut_at_stop
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import Fingerprint
from rltrain.types.samples import Answer, Completion, PolicyVersion, Request, Sampling, Span
from rltrain.watchdog import note_progress
from rltrain.weight_names import CheckpointNames

_FIXED: Mapping[str, Any] = {
    "load_format": "dummy",  # weights arrive by load only
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # no sampling defaults from the model's generation_config.json
    "logprobs_mode": "processed_logprobs",
    "seed": 0,
}
_CPU_BATCH_TOKENS = 4096  # of a forward on CPU; vLLM's own choice there
_REASON_CHARACTERS = 300  # of vLLM's own message, in an error of this module
# vLLM raises smaller temperatures to this, and its log-probs would be those of another distribution
_MIN_TEMPERATURE = 0.01


class VllmColocated:
    """Implements ``RolloutEngine`` with ``vllm.LLM``. Weights arrive by ``load`` only: vLLM starts from the
    config alone.

    model, revision: folder or Hub name; only its config is read. stop_token_ids: the union of every EOS id.
    decode: token ids to text without special tokens. max_model_len: prompt and completion tokens of a row.
    kv_cache_gib: on CPU; on GPU vLLM takes the share ``gpu_memory_utilization`` of the memory. sleep_mode:
    frees GPU memory in ``sleep``; without effect on CPU. adaptive_temperature: supports
    ``Sampling.adaptive``, with a logits processor of vLLM's V1 model runner. truncation: supports
    ``Sampling.truncation``, with another one. device: the learner's, which the
    engine must share; None: not compared. tensor_parallel: neighbouring ranks that hold one engine together;
    each of them calls ``load``, ``fingerprint`` and ``sample`` as often as the others, and gets the answers
    to its own requests. adapter_rank: implements ``AdapterTarget`` for adapters of this rank, with the base's
    weights from the model's files; None: whole weights arrive by ``load``.
    """

    name = "vllm"
    fingerprint_rtol = 1e-12  # weights are compared as stored, except for the order of float64 sums
    _adapters_loaded = 0

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
        truncation: bool = False,
        device: torch.device | None = None,
        tensor_parallel: int = 1,
        adapter_rank: int | None = None,
    ) -> None:
        self._decode = decode
        self._stop = sorted(stop_token_ids)
        self._gpu = torch.cuda.is_available()
        self.dtype = dtype
        self._sleep_mode = sleep_mode and self._gpu
        self._adaptive = adaptive_temperature
        self._truncates = truncation
        self._adapter_rank = adapter_rank
        self._adapter: Any = None  # vLLM's request for the adapter in use; None: the base alone
        self._adapter_folder = tempfile.TemporaryDirectory(prefix="rltrain-adapters-")
        model, revision = config_source(model, revision)
        trusted = trusts(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
        self._limit = min(max_model_len, _max_positions(config, max_model_len))
        self._architecture, classes = read_architecture(config, trusted=trusted)
        self._shapes = WeightShapes(self._architecture.shapes, self._architecture.parameters)
        self._owns_process_group = not torch.distributed.is_initialized()
        self._ranks = EngineRanks(tensor_parallel) if tensor_parallel > 1 else None
        sizes = self._sizes(kv_cache_gib, gpu_memory_utilization) | self._placement(tensor_parallel)
        sizes |= {} if adapter_rank is None else adapter_options(adapter_rank, revision)
        self._start(
            model,
            config,
            trusted=trusted,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self._limit,
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
            enable_sleep_mode=self._sleep_mode,
            **sizes,
        )
        if device is not None and self._gpu:
            require_device(device, torch.cuda.current_device())
        self._llm.apply_model(partial(restore_classes, before=classes))
        self._places = self._find_places(model)
        self._cache_asleep = False
        if not self._gpu:
            self._llm.apply_model(pack_experts_on_reload)
        self.version: PolicyVersion | None = None
        self.state = EngineState.MAPPED

    def _start(self, model: str, config: PreTrainedConfig, *, trusted: bool, **options: Any) -> None:
        """Starts vLLM with the model's ``config`` alone. Raises UserError where it refuses the model."""
        # the V2 runner has another interface of logits processors
        processors = self._processors()
        runner = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if processors else {}
        folder = str(config_folder(config))
        source = folder if self._adapter_rank is None else model
        with unchanged_process(**runner), contextlib.ExitStack() as start_errors:
            vllm = import_vllm()
            start_errors.enter_context(_explain_start_errors(model))
            if self._ranks is not None and not self._gpu:
                start_errors.enter_context(own_shared_memory())
            self._llm: Any = vllm.LLM(
                source,
                trust_remote_code=trusted,
                logits_processors=processors or None,
                **{**_FIXED, **options},
            )
        _note_steps(self._llm.llm_engine)
        self._params_class = vllm.SamplingParams
        self._require_processed_logprobs()

    def _processors(self) -> list[str]:
        """vLLM imports them only once it has read their names."""
        package = "rltrain.rollout.engines.vllm"
        names = [f"{package}.temperature:AdaptiveTemperatureProcessor"] if self._adaptive else []
        return names + ([f"{package}.truncation:TruncationProcessor"] if self._truncates else [])

    def _require_processed_logprobs(self) -> None:
        mode = self._llm.llm_engine.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise RuntimeError(
                f"vLLM runs with logprobs_mode {mode!r}, not processed_logprobs: its log-probs would ignore "
                "the temperature"
            )

    def _placement(self, tensor_parallel: int) -> dict[str, Any]:
        """Which ranks hold the engine. Raises UserError where they cannot."""
        ranks = 1 if self._owns_process_group else torch.distributed.get_world_size()
        require_ranks(tensor_parallel, ranks)
        if ranks == 1:
            return {}
        # Each of the launcher's ranks calls an engine. vLLM's default executor would put all of them on the
        # first GPU; this one takes the GPU of LOCAL_RANK.
        return {
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": tensor_parallel,
        }

    def _sizes(self, kv_cache_gib: float, gpu_memory_utilization: float) -> dict[str, Any]:
        if self._gpu:
            return {"gpu_memory_utilization": gpu_memory_utilization}
        # vLLM 0.32 rewinds a seeded request's generator after part of a prompt, which CPU generators cannot
        # do. Prompts are therefore not divided.
        return {
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, self._limit),
        }

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``WeightTarget.load``."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("load() while asleep: call wake() first")
        # until the last weight is loaded, the weights belong to no version
        self.version = None
        self.state = EngineState.MAPPED
        # tied weights are sent once, as in a checkpoint: some of vLLM's models do not know the second name
        ties = self._architecture.ties
        weights = ((name, weight.detach()) for name, weight in self._shapes.check(stream) if name not in ties)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except BaseException:
            self._llm.apply_model(partial(abandon_reload, model_config=self._llm.llm_engine.model_config))
            raise
        self._llm.apply_model(repack_heads)
        if self._cache_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._cache_asleep = False
        self._require_empty_cache()
        self.version = version
        self.state = EngineState.LOADED

    def load_adapter(
        self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: PolicyVersion
    ) -> None:
        """See ``AdapterTarget.load_adapter``.

        Each load has a name, number and folder of its own: vLLM's caches know an adapter by these, and would
        keep what they computed with older weights.
        """
        from vllm.lora.request import LoRARequest

        previous = self._adapter
        self.use_base(None)
        self._adapters_loaded += 1
        number = self._adapters_loaded
        folder = Path(self._adapter_folder.name) / f"version-{version}-load-{number}"
        write_adapter(folder, config, weights)
        request = LoRARequest(f"policy-{version}-{number}", number, str(folder))
        if not self._llm.llm_engine.add_lora(request):
            raise RuntimeError(f"vLLM did not load the adapter of version {version} from {folder}")
        self._adapter = request
        if previous is not None:
            self._llm.llm_engine.remove_lora(previous.lora_int_id)
            shutil.rmtree(previous.lora_path)
        self.version = version
        self.state = EngineState.LOADED

    def use_base(self, version: PolicyVersion | None) -> None:
        """See ``AdapterTarget.use_base``. version None: of no version, until an adapter is loaded."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("the engine is asleep and holds no weights: call wake() first")
        self._require_empty_cache()
        self.version = version
        self.state = EngineState.MAPPED if version is None else EngineState.LOADED
        if version is not None:
            self._adapter = None

    def adapter_fingerprint(self) -> Mapping[str, Fingerprint]:
        """See ``AdapterTarget.adapter_fingerprint``."""
        if self._adapter is None:
            return {}
        arguments = (self._adapter.lora_int_id, self._adapter_rank, self._places)
        return self._llm.collective_rpc(adapter_fingerprints, args=arguments)[0]

    def prompt_log_probs(self, token_ids: Sequence[int]) -> list[list[float]]:
        """See ``AdapterTarget.prompt_log_probs``."""
        params = self._params_class(
            max_tokens=1, temperature=1.0, seed=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
        )
        prompt = {"prompt_token_ids": list(token_ids), "cache_salt": f"{self.version} probe"}
        (output,) = self._llm.generate([prompt], params, use_tqdm=False, lora_request=self._adapter)
        scored = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [[logprobs[token].logprob for token, logprobs in scored]]

    def _require_empty_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM kept its prefix cache, which holds keys and values of older weights; are requests "
                "still running?"
            )

    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``; a tied head is reported under both its names."""
        architecture = self._architecture
        if self._ranks is None:
            read = partial(layer_fingerprints, places=self._places, architecture=architecture, names=names)
            return self._llm.apply_model(read)[0]

        def read_products(model: Any) -> list[Product]:
            return list(layer_products(model, self._places, architecture, names))

        return self._ranks.fingerprints(self._llm.apply_model(read_products)[0])

    def _find_places(self, model: str) -> Mapping[str, Place]:
        """Where vLLM keeps each weight.

        Raises UserError if a weight of the checkpoint, or one of vLLM's own, could not be compared.
        """
        places: Places = self._llm.apply_model(partial(find_places, architecture=self._architecture))[0]
        undividable = [] if self._ranks is None else find_undividable(places.by_name, self._architecture)
        for names, problem in (
            (places.missing, "has no layer for"),
            (places.unexplained, "multiplies with its own"),
            (tuple(undividable), "under tensor_parallel has, in a form of its own,"),
        ):
            if names:
                self.close()
                first, *rest = names
                others = f" and {len(rest)} other weights" if rest else ""
                raise UserError(
                    f"{model}: vLLM's {self._architecture.name} {problem} {first!r}{others}, so that no "
                    "load of it could be proved; use rollout.engine transformers"
                )
        return places.by_name

    def sleep(self) -> None:
        """On GPU frees the memory of weights and cache (level 2: no copy is kept; level 1 for the base of an
        adapter: a copy on the host); on CPU only forgets the version.
        """
        if self.state is EngineState.ASLEEP:
            return
        self.version = None
        self.state = EngineState.ASLEEP
        if self._sleep_mode:
            self._llm.sleep(level=2 if self._adapter_rank is None else 1)
            self._cache_asleep = True

    def wake(self) -> None:
        """Maps the memory of the weights; ``load`` maps that of the cache, once the learner's copies of the
        weights are no longer needed.
        """
        if self.state is not EngineState.ASLEEP:
            return
        if self._sleep_mode:
            self._llm.wake_up(tags=["weights"] if self._adapter_rank is None else None)
        self.state = EngineState.MAPPED

    def close(self) -> None:
        if self._llm is None:
            return
        self.version = None
        self.state = EngineState.ASLEEP
        with contextlib.nullcontext() if self._owns_process_group else kept_process_group():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._adapter_folder.cleanup()
        gc.collect()

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``. All answers come at the end."""
        require_version(self, policy)
        require_fit(requests, self._limit, "vLLM's max_model_len or the model's max_position_embeddings")
        for request in requests:
            self._require_supported(request.sampling)
        self.state = EngineState.SERVING
        places = range(len(requests))
        if self._ranks is not None:
            requests, places = self._ranks.pool(requests)

        # The salt is part of the prefix cache's key, so that keys and values of other weights are never
        # reused, nor those of another use, because they differ in rounding.
        inputs = [
            {
                "prompt_token_ids": list(request.prompt.token_ids),
                "cache_salt": f"{policy} {request.sampling.cache}",
            }
            for request in requests
        ]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self._gpu else []):
            params = [self._params(index, request) for index, request in enumerate(requests)]
            outputs = self._llm.generate(inputs, params, use_tqdm=False, lora_request=self._adapter)

        corrections = self._corrections() if any(map(_adapts_temperature, requests)) else None
        kept = self._kept_sets() if any(map(_returns_kept, requests)) else None
        answers: list[Answer] = []
        for number, index in enumerate(places):
            request = requests[index]
            output = outputs[index]
            completions = [
                self._completion(completion, request.sampling, policy) for completion in output.outputs
            ]
            if corrections is not None and _adapts_temperature(request):
                for place, completion in enumerate(completions):
                    logprobs = corrections.correct(index, params[index].seed + place, completion.logprobs)
                    completions[place] = replace(completion, logprobs=logprobs)
            if kept is not None and _returns_kept(request):
                for place, completion in enumerate(completions):
                    sets = kept.take_sets(index, params[index].seed + place, len(completion.token_ids))
                    completions[place] = replace(completion, kept=sets)
            stop = request.sampling.stop
            if stop:
                completions = [cut_at_stop(completion, stop, self._decode) for completion in completions]
            # vLLM takes no n above 1 for greedy decoding, whose completions are all the same.
            completions = completions * (request.count // len(completions))
            answers.append(Answer(number, request.prompt, tuple(completions)))
        return iter(answers)

    def _require_supported(self, sampling: Sampling) -> None:
        """Raises ValueError for a temperature or truncation that this engine cannot sample with."""
        if 0 < sampling.temperature < _MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {sampling.temperature}: vLLM raises it to {_MIN_TEMPERATURE}; use 0 (greedy) "
                "or at least that"
            )
        if sampling.adaptive is not None and sampling.temperature > 0 and not self._adaptive:
            raise ValueError(
                "this vLLM engine was started without adaptive_temperature and cannot adapt the temperature "
                "of a token"
            )
        if not (sampling.truncation.is_whole or self._truncates):
            raise ValueError("this vLLM engine was started without truncation and samples from all tokens")

    def _corrections(self) -> Any:
        from rltrain.rollout.engines.vllm.temperature import Corrections, take_corrections

        return Corrections(self._llm.collective_rpc(take_corrections)[0])

    def _kept_sets(self) -> Any:
        from rltrain.rollout.engines.vllm.truncation import KeptSets, take_kept

        return KeptSets(self._llm.collective_rpc(take_kept)[0])

    def _params(self, index: int, request: Request) -> Any:
        sampling = request.sampling
        extra = _extra_args(index, sampling) if self._adaptive or self._truncates else None
        # vLLM adds the place in the request to the seed
        seed = stable_hash(sampling.seed, request.prompt.id) + request.first
        return self._params_class(
            n=1 if sampling.temperature == 0 else request.count,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            stop_token_ids=self._stop,
            ignore_eos=True,  # the ids above include every EOS
            detokenize=False,
            top_p=1.0,  # truncation is the processor's, in the order that every engine has
            top_k=0,
            repetition_penalty=sampling.repetition_penalty,
            extra_args=extra,
        )

    def _completion(self, output: Any, sampling: Sampling, policy: PolicyVersion) -> Completion:
        tokens = tuple(output.token_ids)
        if list(tokens) != output.logprobs.token_ids:
            raise RuntimeError(
                "vLLM's log-probs are not those of its tokens, one each; this vLLM version is not supported"
            )
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended a completion with {output.finish_reason!r}; expected stop or length"
            )
        text = self._decode(tokens)
        versions = (Span(0, len(tokens), policy),)
        return Completion(
            tokens, tuple(output.logprobs.logprobs), output.finish_reason, text, versions, sampling.source
        )


def _note_steps(engine: Any) -> None:
    """Every decoding step of ``engine`` restarts the deadline of those who wait for its completions."""
    step = engine.step

    def noted_step() -> Any:
        outputs = step()
        note_progress()
        return outputs

    engine.step = noted_step


def _max_positions(config: PreTrainedConfig, default: int) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", default)


def _adapts_temperature(request: Request) -> bool:
    """Whether the temperature of the request's tokens is adapted; greedy decoding has no temperature."""
    return request.sampling.adaptive is not None and request.sampling.temperature > 0


def require_device(learner: torch.device, current: int) -> None:
    """Raises RuntimeError unless this process's current GPU, after vLLM has started, is the learner's.

    current: the index of the current GPU, which vLLM sets to its own.
    """
    if learner.index is not None and learner.index != current:
        raise RuntimeError(
            f"vLLM took cuda:{current}, but this rank's learner is on {learner}: start the ranks with "
            "accelerate launch or torchrun, which set LOCAL_RANK for each"
        )


def read_architecture(config: PreTrainedConfig, *, trusted: bool) -> tuple[Architecture, ClassStates]:
    """The architecture of transformers' model and the states of its classes, read without weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    names = CheckpointNames(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    architecture = Architecture(
        type(model).__name__, names.shapes, names.parameters, names.ties, frozenset(transposed)
    )
    return architecture, class_states(model)


@contextlib.contextmanager
def _explain_start_errors(model: str) -> Iterator[None]:
    """Raises UserError, in one line, where vLLM cannot start with the architecture."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{model}: vLLM does not start with it: {type(error).__name__}: {reason[:_REASON_CHARACTERS]}; "
            "use rollout.engine transformers, or mend what it names"
        ) from error


def _returns_kept(request: Request) -> bool:
    """Whether the request's completions come with the tokens that they were drawn from."""
    sampling = request.sampling
    return sampling.returns_kept and sampling.temperature > 0 and not sampling.truncation.is_whole


def _extra_args(index: int, sampling: Sampling) -> dict[str, Any] | None:
    from rltrain.rollout.engines.vllm import temperature, truncation

    return {
        **(temperature.extra_args(index, sampling) or {}),
        **(truncation.extra_args(index, sampling) or {}),
    } or None
