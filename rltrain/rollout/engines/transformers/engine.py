"""The embedded engine: a transformers model decoded with continuous batching, on CPU or GPU, without
another install.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from rltrain.model_limits import context_of
from rltrain.protocols import EngineState
from rltrain.remote_code import trusts
from rltrain.rollout.engines.checks import WeightShapes, require_fit, require_version
from rltrain.rollout.engines.transformers.em_inf import minimise_entropy
from rltrain.rollout.engines.transformers.kv_cache import GROUPED_SDPA, DecodeCache, layers_of
from rltrain.rollout.engines.transformers.sampling import sample_tokens_
from rltrain.rollout.engines.transformers.token_decoder import TokenDecoder, place_together
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import Answer, Completion, Finish, PolicyVersion, Prompt, Request, Sampling, Span
from rltrain.weight_names import CheckpointNames

PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill forward, which bounds its activations
_ROUNDING, _ROUNDING_BFLOAT16 = (
    1e-3,
    5e-2,
)  # of the largest logit: how far decoding may be from the plain forward
_CACHE_START = 64  # completion columns the cache starts with
_COMPACT_SHARE = (
    16  # finished rows leave once they are a sixteenth of the batch: each departure copies a cache row
)
_ADMIT_SHARE = 8  # waiting rows enter once an eighth of the slots is free: each entry pays a prefill


@dataclass(slots=True)
class _Row:
    """One completion being written."""

    prompt: int  # its position among the prompts decoded together
    random: Random  # of this row alone, so what it draws does not depend on its neighbours
    prompt_length: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def position(self) -> int:
        """Of the last token written, which the next step feeds."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(frozen=True)
class _Prefill:
    """Keys and values of some unique prompts, and the logits of their first completion token."""

    layers: list[tuple[Tensor, Tensor]]  # each (U, T, key-value heads, head size)
    logits: Tensor  # (U, V)


class TransformersEngine:
    """Implements ``RolloutEngine`` over its own copy of the model; weights arrive by ``load`` only.

    model, revision: folder or Hub name; only its config is read. stop_token_ids: the union of every EOS id.
    decode: token ids to text without special tokens. max_rows: rows decoded at once. attention: "auto" is
    "sdpa" where the model has it, else "eager". Raises ValueError for models whose decoding this cache cannot
    reproduce: recurrent layers, or a forward that the check at construction finds different.
    """

    name = "transformers"

    def __init__(
        self,
        model: str,
        *,
        stop_token_ids: Collection[int],
        pad_token_id: int,
        decode: Callable[[Sequence[int]], str],
        max_rows: int,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str = "auto",
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows is {max_rows}; at least 1 row must be decoded at once")
        if attention not in ("auto", "sdpa", "eager"):
            raise ValueError(
                f"model.attention: the transformers engine decodes with sdpa or eager, not {attention!r}; "
                "choose one, or engine vllm"
            )
        self.device, self.dtype, self.fingerprint_rtol = torch.device(device), dtype, 1e-12
        self.max_rows, self._pad, self._decode = max_rows, pad_token_id, decode
        self._stop = frozenset(stop_token_ids)
        trusted = trusts(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
        self._limit, self._limit_name = _context_limit(config, model)
        self._model = _random_model(config, self.device, dtype, attention, trusted=trusted)
        self._eager = self._model.config._attn_implementation == "eager"
        self._head = self._model.get_output_embeddings()
        self._decoder: TokenDecoder | None = None  # while tokens are written, for models that it fits
        self._names = CheckpointNames(self._model)
        self._shapes = WeightShapes(self._names.shapes, self._names.parameters)
        self.version: PolicyVersion | None = None
        self.state = EngineState.MAPPED
        self._check_against_plain_forward(model)

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``WeightTarget.load``. No cache outlives a ``sample`` call, so there is none to forget."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("load() while asleep: call wake() first")
        self.version, self.state = (
            None,
            EngineState.MAPPED,
        )  # until the last weight is in, these are nobody's weights
        held = self._held()
        for name, tensor in self._names.from_checkpoint(self._shapes.check(stream)):
            held[name].detach().copy_(tensor)
        self.version, self.state = version, EngineState.LOADED

    @torch.no_grad()
    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``; a tied head is reported under both its names."""
        held = self._names.to_checkpoint(self._held().items(), names)
        return {
            name: weight_fingerprint(name, weight) for name, weight in held if names is None or name in names
        }

    def _held(self) -> dict[str, Tensor]:
        """Every weight under every name it has inside the model, as the model has them now."""
        return self._model.state_dict(keep_vars=True)  # copies nothing

    def sleep(self) -> None:
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.version, self.state = None, EngineState.ASLEEP

    def wake(self) -> None:
        if self.state is not EngineState.ASLEEP:
            return
        named = dict(self._model.named_parameters())
        place_together(named.values(), [self._names.inside[name] for name in named], keep=False)
        self.state = EngineState.MAPPED

    def close(self) -> None:
        self.sleep()

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``.

        Requests of one sampling are decoded together; all answers come at the end.
        """
        require_version(self, policy)
        require_fit(requests, self._limit, self._limit_name)
        self.state = EngineState.SERVING
        alike: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(request.sampling, []).append(index)

        answers: list[Answer] = []
        for sampling, indexes in alike.items():
            answers += self._answers(requests, indexes, sampling, policy)
        return iter(answers)

    def _answers(
        self, requests: Sequence[Request], indexes: Sequence[int], sampling: Sampling, policy: PolicyVersion
    ) -> list[Answer]:
        """To the requests at ``indexes``, which all have this ``sampling``."""
        prompts = [requests[index].prompt for index in indexes]
        rows: list[_Row] = []
        for place, index in enumerate(indexes):
            request = requests[index]
            for sample in range(request.first, request.first + request.count):
                seed = stable_hash(sampling.seed, request.prompt.id, sample)
                rows.append(_Row(place, Random(seed), len(request.prompt.token_ids)))
        with self._writing():
            self._write(rows, prompts, sampling)

        written = iter([self._completion(row, sampling, policy) for row in rows])
        return [
            Answer(index, requests[index].prompt, tuple(itertools.islice(written, requests[index].count)))
            for index in indexes
        ]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, the weights stay as they are."""
        with torch.inference_mode():
            self._decoder = (
                TokenDecoder(self._model) if TokenDecoder.fits(self._model) and not self._eager else None
            )
            try:
                yield
            finally:
                self._decoder = None  # else it would keep the weights' memory while the engine sleeps

    def _completion(self, row: _Row, sampling: Sampling, policy: PolicyVersion) -> Completion:
        assert row.finish is not None
        text = self._decode(row.tokens)
        versions = (Span(0, len(row.tokens), policy),)
        return Completion(tuple(row.tokens), tuple(row.logprobs), row.finish, text, versions, sampling.source)

    def _write(self, rows: Sequence[_Row], prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Decode every row to its end: waiting rows enter as finished ones leave."""
        if not rows:
            return
        slots, longest = min(self.max_rows, len(rows)), max(row.prompt_length for row in rows)
        cache = DecodeCache(slots, longest + min(sampling.max_tokens, _CACHE_START))
        active: list[_Row] = []
        waiting = list(reversed(rows))
        held: dict[int, tuple[_Prefill, int]] = {}
        while waiting or active:
            alive = sum(row.finish is None for row in active)
            enough = max(1, slots // _ADMIT_SHARE)
            admit = bool(waiting) and (alive == 0 or slots - alive >= min(enough, len(waiting)))
            if admit or len(active) - alive > len(active) // _COMPACT_SHARE:
                _close_holes(active, alive, cache)
            if admit:
                entering = [waiting.pop() for _ in range(min(slots - alive, len(waiting)))]
                self._enter(entering, active, cache, prompts, sampling, held)
                held = (
                    {waiting[-1].prompt: held[waiting[-1].prompt]}
                    if waiting and waiting[-1].prompt in held
                    else {}
                )
            if active:
                cache.reserve(max(row.position for row in active) + 1, longest + sampling.max_tokens)
                self._sample_into(active, self._step(active, cache), sampling)

    def _enter(
        self,
        entering: Sequence[_Row],
        active: list[_Row],
        cache: DecodeCache,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        held: dict[int, tuple[_Prefill, int]],
    ) -> None:
        """Prefill each new prompt once, draw first tokens, and give rows that go on a slot.

        ``held`` gains the prefills.
        """
        fresh = sorted(
            {row.prompt for row in entering} - held.keys(), key=lambda index: len(prompts[index].token_ids)
        )
        for batch in _batches(fresh, [len(prompts[index].token_ids) for index in fresh]):
            prefill = self._prefill([prompts[index].token_ids for index in batch])
            held.update({index: (prefill, place) for place, index in enumerate(batch)})
        for prefill in {id(pair[0]): pair[0] for pair in held.values()}.values():
            mine = [row for row in entering if held[row.prompt][0] is prefill]
            source = torch.tensor([held[row.prompt][1] for row in mine], device=self.device)
            self._sample_into(mine, prefill.logits[source], sampling)
            going_on = [place for place, row in enumerate(mine) if row.finish is None]
            cache.admit(prefill.layers, source[going_on], start=len(active))
            active.extend(mine[place] for place in going_on)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> _Prefill:
        """One right-padded forward: causal attention never looks right, so it needs no padding mask."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor(
            [[*prompt, *[self._pad] * (width - len(prompt))] for prompt in prompts], device=self.device
        )
        if self._decoder is not None:
            hidden, layers = self._decoder.read(ids)
        else:
            cache = DynamicCache()
            hidden = self._model.base_model(
                input_ids=ids, past_key_values=cache, use_cache=True
            ).last_hidden_state
            layers = layers_of(cache)
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return _Prefill(layers, self._head(last))

    def _step(self, active: Sequence[_Row], cache: DecodeCache) -> Tensor:
        """(R, V) logits of each row's next token."""
        positions = [row.position for row in active]
        columns = max(positions) + 1
        fed = torch.tensor([[row.tokens[-1] for row in active], positions], device=self.device)
        cache.begin_step(fed[1], columns)
        mask = None
        if self._eager or min(positions) + 1 < columns:
            beyond = torch.arange(columns, device=self.device) > fed[1][:, None]
            mask = torch.zeros_like(beyond, dtype=self._model.dtype).masked_fill_(beyond, float("-inf"))[
                :, None, None
            ]
        if self._decoder is not None:
            return self._head(self._decoder(fed[0], fed[1], mask, cache))
        hidden = self._model.base_model(
            input_ids=fed[0][:, None],
            position_ids=fed[1][:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(hidden[:, -1])

    def _sample_into(self, rows: Sequence[_Row], logits: Tensor, sampling: Sampling) -> None:
        """Append one token to every unfinished row.

        Raises FloatingPointError when a distribution is not finite.
        """
        uniform = torch.tensor(
            [row.random.random() if row.finish is None else 0.0 for row in rows], device=self.device
        )
        if sampling.sharpen_below is not None:
            logits = minimise_entropy(logits, threshold=sampling.sharpen_below)
        tokens, logprobs = sample_tokens_(logits, uniform, sampling.temperature, sampling.adaptive)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish is not None:
                continue
            if not math.isfinite(logprob):
                raise FloatingPointError(
                    f"version {self.version}: logits are not finite at token {len(row.tokens)} of a "
                    "completion; check the weights"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in self._stop:
                row.finish = "stop"
            elif len(row.tokens) == sampling.max_tokens:
                row.finish = "length"

    def _check_against_plain_forward(self, name: str) -> None:
        """Decode two tokens beside prompts of unequal length and compare with the model's own
        forward, weights still random.
        """
        with self._writing():
            self._compare_with_plain_forward(name)

    def _compare_with_plain_forward(self, name: str) -> None:
        size, vocabulary = min(4, self._limit - 2), self._model.config.get_text_config().vocab_size
        script = [[(7 * row + 3 * place + 1) % vocabulary for place in range(size + row)] for row in range(3)]
        rows = [_Row(index, Random(0), len(ids) - 2) for index, ids in enumerate(script)]
        cache = DecodeCache(3, size + 2)
        prefill = self._prefill([ids[:-2] for ids in script])
        cache.admit(prefill.layers, torch.arange(3, device=self.device), start=0)
        for step in (-2, -1):
            for row, ids in zip(rows, script, strict=True):
                row.tokens.append(ids[step])
            logits = self._step(rows, cache)
            for ids, ours in zip(script, logits, strict=True):
                upto = len(ids) + step + 1
                plain = self._model(
                    input_ids=torch.tensor([ids[:upto]], device=self.device), use_cache=False
                ).logits[0, -1]
                allowed = (
                    _ROUNDING if self._model.dtype == torch.float32 else _ROUNDING_BFLOAT16
                ) * plain.abs().max()
                if not (ours - plain).abs().max() <= allowed:
                    raise ValueError(
                        f"{name}: decoding with the transformers engine's cache differs from the model's "
                        "plain forward by "
                        f"{(ours - plain).abs().max():.3g}; this architecture needs rollout.engine vllm"
                    )


def _context_limit(config: PreTrainedConfig, name: str) -> tuple[int, str]:
    """Tokens a row may have, and what sets the bound.

    Raises ValueError for layers without keys and values per token.
    """
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{name} has {', '.join(sorted(strange))} layers, which the transformers engine cannot cache; "
            "use rollout.engine vllm"
        )
    context = context_of(config)
    if context is None:
        raise ValueError(
            f"{name} has no max_position_embeddings, which bounds the transformers engine's cache; use "
            "rollout.engine vllm"
        )
    limit = context.tokens
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or (
        getattr(text, "layer_types", None) is None and getattr(text, "use_sliding_window", True)
    )
    if window is not None and slides and window < limit:
        return (
            window,
            "the sliding window, up to which the transformers engine decodes (rollout.engine vllm goes "
            "further)",
        )
    return limit, f"the model ({context.why})"


def _random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attention: str, *, trusted: bool
) -> Any:
    """The architecture with weights that ``load`` will replace, leaving the caller's random state as
    it was.
    """
    options = {} if attention == "auto" else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trusted, **options
        )
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED_SDPA)
    model.eval().requires_grad_(False)
    parameters = list(model.parameters())
    place_together(parameters, [parameter.shape for parameter in parameters], keep=True)
    return model


def _batches(indexes: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut ``indexes``, sorted by ``lengths``, into prefill batches of at most PREFILL_TOKENS padded
    tokens.
    """
    batches: list[list[int]] = []
    for index, length in zip(indexes, lengths, strict=True):
        if not batches or (len(batches[-1]) + 1) * length > PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _close_holes(active: list[_Row], alive: int, cache: DecodeCache) -> None:
    """Let finished rows leave: the last live rows move into their slots, and rows 0..alive-1 are live
    again.
    """
    holes = [place for place in range(alive) if active[place].finish is not None]
    movers = [place for place in range(alive, len(active)) if active[place].finish is None]
    cache.move(movers, holes)
    for hole, mover in zip(holes, movers, strict=True):
        active[hole] = active[mover]
    del active[alive:]
