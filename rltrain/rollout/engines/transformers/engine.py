"""The embedded engine: a transformers model decoded with continuous batching, on CPU or GPU, without any
further package.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from rltrain.errors import UserError
from rltrain.head_scales import head_scales
from rltrain.model_files import config_source
from rltrain.model_limits import decoding_limit
from rltrain.protocols import EngineState
from rltrain.remote_code import trusts
from rltrain.rollout.engines.checks import WeightShapes, require_fit, require_version
from rltrain.rollout.engines.transformers.em_inf import minimise_entropy
from rltrain.rollout.engines.transformers.kv_cache import GROUPED_SDPA, DecodeCache, layers_of
from rltrain.rollout.engines.transformers.sampling import sample_tokens_, truncate
from rltrain.rollout.engines.transformers.token_decoder import TokenDecoder, place_together
from rltrain.rollout.truncation import contains_stop, penalise_repetition_
from rltrain.seeds import stable_hash
from rltrain.tensor_ops import Fingerprint, weight_fingerprint
from rltrain.types.samples import (
    Answer,
    Completion,
    Finish,
    PolicyVersion,
    Prompt,
    Request,
    Sampling,
    Span,
    TokenSets,
)
from rltrain.watchdog import note_progress
from rltrain.weight_names import CheckpointNames

PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill forward, which bounds its activations
# largest difference between decoding and the plain forward, as a share of the largest logit
_ROUNDING = 1e-3
_ROUNDING_BFLOAT16 = 5e-2
_CACHE_START = 64  # completion columns in a new cache
# finished rows leave once they are a sixteenth of the batch, because each departure copies a cache row
_COMPACT_SHARE = 16
# waiting rows enter once an eighth of the slots is free, because each entry costs a prefill
_ADMIT_SHARE = 8


@dataclass(slots=True)
class _Row:
    """A completion in progress."""

    prompt: int  # its position among the prompts decoded together
    random: Random  # of this row only, so that its tokens do not depend on its neighbours
    prompt_length: int
    prompt_ids: Sequence[int] = ()  # read where repetitions are penalised
    kept: TokenSets | None = None  # filled where the sampling asks for it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def position(self) -> int:
        """The position of the last token, which is the input of the next step."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(frozen=True)
class _Prefill:
    """Keys and values of several distinct prompts, and the logits of their first completion token."""

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
            raise UserError(f"rollout.max_rows is {max_rows}; at least 1 row must be decoded at once")
        if attention not in ("auto", "sdpa", "eager"):
            raise UserError(
                f"model.attention: the transformers engine decodes with sdpa or eager, not {attention!r}; "
                "choose one, or engine vllm"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.fingerprint_rtol = 1e-12
        self.max_rows = max_rows
        self._pad = pad_token_id
        self._decode = decode
        self._stop = frozenset(stop_token_ids)
        model, revision = config_source(model, revision)
        trusted = trusts(model, revision)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
        self._context = decoding_limit(config, model)
        self._model = _random_model(config, self.device, dtype, attention, trusted=trusted)
        self._eager = self._model.config._attn_implementation == "eager"
        self._head = self._model.get_output_embeddings()
        self._hidden_scale, self._logit_scale = head_scales(self._model)
        self._decoder: TokenDecoder | None = None  # during sampling, for models that it fits
        self._names = CheckpointNames(self._model)
        self._shapes = WeightShapes(self._names.shapes, self._names.parameters)
        self.version: PolicyVersion | None = None
        self.state = EngineState.MAPPED
        self._check_against_plain_forward(model)

    def load(self, stream: Iterable[tuple[str, Tensor]], version: PolicyVersion) -> None:
        """See ``WeightTarget.load``. No cache outlives a ``sample`` call, so there is none to forget."""
        if self.state is EngineState.ASLEEP:
            raise RuntimeError("load() while asleep: call wake() first")
        # until the last weight is copied, the weights belong to no version
        self.version = None
        self.state = EngineState.MAPPED
        weights = self._weights()
        for name, tensor in self._names.from_checkpoint(self._shapes.check(stream)):
            weights[name].detach().copy_(tensor)
        self.version = version
        self.state = EngineState.LOADED

    @torch.no_grad()
    def fingerprint(self, names: Collection[str] | None = None) -> Mapping[str, Fingerprint]:
        """See ``WeightTarget.fingerprint``; a tied head is reported under both its names."""
        weights = self._names.to_checkpoint(self._weights().items(), names)
        return {
            name: weight_fingerprint(name, weight)
            for name, weight in weights
            if names is None or name in names
        }

    def _weights(self) -> dict[str, Tensor]:
        """The model's current weights, under every name that a weight has inside the model."""
        return self._model.state_dict(keep_vars=True)  # copies nothing

    def sleep(self) -> None:
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.version = None
        self.state = EngineState.ASLEEP

    def wake(self) -> None:
        if self.state is not EngineState.ASLEEP:
            return
        parameters = dict(self._model.named_parameters())
        place_together(parameters.values(), [self._names.inside[name] for name in parameters], keep=False)
        self.state = EngineState.MAPPED

    def close(self) -> None:
        self.sleep()

    def sample(self, requests: Sequence[Request], policy: PolicyVersion) -> Iterator[Answer]:
        """See ``Sampler.sample``.

        Requests with equal sampling are decoded together; all answers come at the end.
        """
        require_version(self, policy)
        require_fit(requests, self._context.tokens, self._context.why)
        self.state = EngineState.SERVING
        indexes_by_sampling: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            indexes_by_sampling.setdefault(request.sampling, []).append(index)

        answers: list[Answer] = []
        for sampling, indexes in indexes_by_sampling.items():
            answers += self._answers(requests, indexes, sampling, policy)
        return iter(answers)

    def _answers(
        self, requests: Sequence[Request], indexes: Sequence[int], sampling: Sampling, policy: PolicyVersion
    ) -> list[Answer]:
        """The answers to the requests at ``indexes``, which all have this ``sampling``."""
        prompts = [requests[index].prompt for index in indexes]
        rows: list[_Row] = []
        for place, index in enumerate(indexes):
            request = requests[index]
            for sample in range(request.first, request.first + request.count):
                seed = stable_hash(sampling.seed, request.prompt.id, sample)
                ids = request.prompt.token_ids
                kept = TokenSets.empty() if sampling.returns_kept else None
                rows.append(_Row(place, Random(seed), len(ids), ids, kept))
        with self._token_decoder():
            self._decode_rows(rows, prompts, sampling)

        completions = iter([self._completion(row, sampling, policy) for row in rows])
        return [
            Answer(index, requests[index].prompt, tuple(itertools.islice(completions, requests[index].count)))
            for index in indexes
        ]

    @contextlib.contextmanager
    def _token_decoder(self) -> Iterator[None]:
        """Provides the token decoder in the ``with`` block, during which the weights must not change."""
        with torch.inference_mode():
            if TokenDecoder.fits(self._model) and not self._eager:
                self._decoder = TokenDecoder(self._model)
            try:
                yield
            finally:
                self._decoder = None  # else it would keep the weights' memory while the engine sleeps

    def _completion(self, row: _Row, sampling: Sampling, policy: PolicyVersion) -> Completion:
        assert row.finish is not None
        text = self._decode(row.tokens)
        versions = (Span(0, len(row.tokens), policy),)
        return Completion(
            tuple(row.tokens),
            tuple(row.logprobs),
            row.finish,
            text,
            versions,
            sampling.source,
            kept=row.kept,
        )

    def _decode_rows(self, rows: Sequence[_Row], prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Decodes every row to its end; waiting rows enter as finished rows leave."""
        if not rows:
            return
        slots = min(self.max_rows, len(rows))
        longest = max(row.prompt_length for row in rows)
        cache = DecodeCache(slots, longest + min(sampling.max_tokens, _CACHE_START))
        active: list[_Row] = []
        waiting = list(reversed(rows))
        prefills: dict[int, tuple[_Prefill, int]] = {}  # by prompt: its prefill, and its row there
        while waiting or active:
            note_progress()
            alive = sum(row.finish is None for row in active)
            min_free = max(1, slots // _ADMIT_SHARE)
            admit = bool(waiting) and (alive == 0 or slots - alive >= min(min_free, len(waiting)))
            if admit or len(active) - alive > len(active) // _COMPACT_SHARE:
                _remove_finished(active, alive, cache)
            if admit:
                entering = [waiting.pop() for _ in range(min(slots - alive, len(waiting)))]
                self._admit(entering, active, cache, prompts, sampling, prefills)
                next_prompt = waiting[-1].prompt if waiting else None
                prefills = {prompt: prefill for prompt, prefill in prefills.items() if prompt == next_prompt}
            if active:
                cache.reserve(max(row.position for row in active) + 1, longest + sampling.max_tokens)
                self._append_tokens(active, self._step(active, cache), sampling)

    def _admit(
        self,
        entering: Sequence[_Row],
        active: list[_Row],
        cache: DecodeCache,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        prefills: dict[int, tuple[_Prefill, int]],
    ) -> None:
        """Prefills each new prompt once, draws first tokens, and gives a slot to each row that is not
        finished.

        Adds the new prefills to ``prefills``.
        """
        new_prompts = sorted(
            {row.prompt for row in entering} - prefills.keys(),
            key=lambda index: len(prompts[index].token_ids),
        )
        for batch in _batches(new_prompts, [len(prompts[index].token_ids) for index in new_prompts]):
            prefill = self._prefill([prompts[index].token_ids for index in batch])
            prefills.update({index: (prefill, place) for place, index in enumerate(batch)})

        for prefill in {id(pair[0]): pair[0] for pair in prefills.values()}.values():
            rows = [row for row in entering if prefills[row.prompt][0] is prefill]
            source = torch.tensor([prefills[row.prompt][1] for row in rows], device=self.device)
            self._append_tokens(rows, prefill.logits[source], sampling)
            unfinished = [place for place, row in enumerate(rows) if row.finish is None]
            cache.admit(prefill.layers, source[unfinished], start=len(active))
            active.extend(rows[place] for place in unfinished)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> _Prefill:
        """A right-padded forward. It needs no padding mask, because causal attention never looks right."""
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
        return _Prefill(layers, self._logits(last))

    def _step(self, active: Sequence[_Row], cache: DecodeCache) -> Tensor:
        """(R, V) logits of each row's next token."""
        positions = [row.position for row in active]
        columns = max(positions) + 1
        inputs = torch.tensor([[row.tokens[-1] for row in active], positions], device=self.device)
        cache.begin_step(inputs[1], columns)
        mask = None
        if self._eager or min(positions) + 1 < columns:
            beyond = torch.arange(columns, device=self.device) > inputs[1][:, None]
            mask = torch.zeros_like(beyond, dtype=self._model.dtype).masked_fill_(beyond, float("-inf"))
            mask = mask[:, None, None]
        if self._decoder is not None:
            return self._logits(self._decoder(inputs[0], inputs[1], mask, cache))
        hidden = self._model.base_model(
            input_ids=inputs[0][:, None],
            position_ids=inputs[1][:, None],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._logits(hidden[:, -1])

    def _logits(self, hidden: Tensor) -> Tensor:
        """(R, V) logits of the last hidden states (R, H), with the factors that some architectures apply."""
        scaled = hidden if self._hidden_scale == 1.0 else hidden * self._hidden_scale
        logits = self._head(scaled)
        return logits if self._logit_scale == 1.0 else logits * self._logit_scale

    def _append_tokens(self, rows: Sequence[_Row], logits: Tensor, sampling: Sampling) -> None:
        """Samples a token for every unfinished row and appends it.

        Raises FloatingPointError when a distribution is not finite.
        """
        uniform = torch.tensor(
            [row.random.random() if row.finish is None else 0.0 for row in rows], device=self.device
        )
        if sampling.sharpen_below is not None:
            logits = minimise_entropy(logits, threshold=sampling.sharpen_below)
        if sampling.repetition_penalty != 1:
            texts = [[*row.prompt_ids, *row.tokens] for row in rows]
            logits = penalise_repetition_(logits.float(), texts, sampling.repetition_penalty)
        temperature = sampling.temperature
        kept: list[tuple[array[int], float]] | None = None
        if temperature > 0 and not sampling.truncation.is_whole:
            logits, kept = truncate(logits, temperature, sampling.truncation, sets=sampling.returns_kept)
            temperature = 1.0
        tokens, logprobs = sample_tokens_(logits, uniform, temperature, sampling.adaptive)
        for place, (row, token, logprob) in enumerate(
            zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            if row.finish is not None:
                continue
            if not math.isfinite(logprob):
                raise FloatingPointError(
                    f"version {self.version}: logits are not finite at token {len(row.tokens)} of a "
                    "completion; check the weights"
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if row.kept is not None and kept is not None:
                row.kept.append(*kept[place])
            if token in self._stop or (
                sampling.stop and contains_stop(row.tokens, sampling.stop, self._decode)
            ):
                row.finish = "stop"
            elif len(row.tokens) == sampling.max_tokens:
                row.finish = "length"

    def _check_against_plain_forward(self, name: str) -> None:
        """Decodes two tokens after prompts of unequal length and compares the logits with those of the
        model's own forward. The weights are still random.
        """
        with self._token_decoder():
            self._compare_with_plain_forward(name)

    def _compare_with_plain_forward(self, name: str) -> None:
        size = min(4, self._context.tokens - 2)
        vocabulary = self._model.config.get_text_config().vocab_size
        texts = [[(7 * row + 3 * place + 1) % vocabulary for place in range(size + row)] for row in range(3)]
        rows = [_Row(index, Random(0), len(ids) - 2) for index, ids in enumerate(texts)]
        cache = DecodeCache(3, size + 2)
        prefill = self._prefill([ids[:-2] for ids in texts])
        cache.admit(prefill.layers, torch.arange(3, device=self.device), start=0)
        rounding = _ROUNDING if self._model.dtype == torch.float32 else _ROUNDING_BFLOAT16
        for step in (-2, -1):
            for row, ids in zip(rows, texts, strict=True):
                row.tokens.append(ids[step])
            logits = self._step(rows, cache)
            for ids, decoded in zip(texts, logits, strict=True):
                input_ids = torch.tensor([ids[: len(ids) + step + 1]], device=self.device)
                plain = self._model(input_ids=input_ids, use_cache=False).logits[0, -1]
                difference = (decoded - plain).abs().max()
                if not difference <= rounding * plain.abs().max():
                    raise UserError(
                        f"{name}: decoding with the transformers engine's cache differs from the model's "
                        f"plain forward by {difference:.3g}; this architecture needs rollout.engine vllm"
                    )


def _random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attention: str, *, trusted: bool
) -> Any:
    """The architecture with random weights, which ``load`` will replace. The caller's random state stays
    unchanged.
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
    """Divides ``indexes``, sorted by ``lengths``, into batches of at most PREFILL_TOKENS padded tokens."""
    batches: list[list[int]] = []
    for index, length in zip(indexes, lengths, strict=True):
        if not batches or (len(batches[-1]) + 1) * length > PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _remove_finished(active: list[_Row], alive: int, cache: DecodeCache) -> None:
    """Removes finished rows: the last live rows move into their slots, so that rows 0..alive-1 are live."""
    holes = [place for place in range(alive) if active[place].finish is not None]
    movers = [place for place in range(alive, len(active)) if active[place].finish is None]
    cache.move(movers, holes)
    for hole, mover in zip(holes, movers, strict=True):
        active[hole] = active[mover]
    del active[alive:]
