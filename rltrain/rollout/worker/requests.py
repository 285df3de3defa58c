"""From a sampler's requests to a worker's, and from a worker's choices to completions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rltrain.rollout.engines.checks import WeightShapes
from rltrain.rollout.truncation import cut_at_stop
from rltrain.rollout.worker.answers import GenerateRequest
from rltrain.rollout.worker.flags import MODEL_NAME
from rltrain.rollout.worker.guard import Choice
from rltrain.seeds import stable_hash
from rltrain.types.samples import Completion, PolicyVersion, Request, Sampling, Span

__all__ = ["AdapterNames", "ServerModel", "make_request", "require_supported", "to_completion"]

# vLLM raises smaller temperatures to this, and its log-probs would be those of another distribution
_MIN_TEMPERATURE = 0.01


@dataclass(frozen=True)
class ServerModel:
    """What the engine must know of the model. shapes: of the weights that a load takes."""

    shapes: WeightShapes
    vocabulary: int
    stop_token_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    max_model_len: int

    def make_completion(self, choice: Choice, sampling: Sampling) -> Completion:
        return to_completion(choice, sampling, self.decode)


@dataclass
class AdapterNames:
    """Names of adapters that no other load has, nor a learner before this one: vLLM's caches know an adapter
    by its name.
    """

    session: str = field(default_factory=lambda: secrets.token_hex(4))
    count: int = 0

    def next(self, version: PolicyVersion) -> str:
        self.count += 1
        return f"policy-{version}-{self.session}-{self.count}"


def make_request(
    request: Request, policy: PolicyVersion, stop_token_ids: Sequence[int], model: str | None = None
) -> GenerateRequest:
    """All samples of ``request``, without an id; ``dataclasses.replace`` makes parts of it.

    model: the adapter, or the base beside adapters, that ``policy`` stands for; None: weights that were
    pushed as ``policy``, which the server knows by itself.

    vLLM adds a sample's place in the request to the seed, so that a part from sample k on has ``seed + k``.
    """
    sampling = request.sampling
    # vLLM takes no n above 1 for greedy decoding, whose completions are all the same
    count = 1 if sampling.temperature == 0 else request.count
    return GenerateRequest(
        id="",
        token_ids=request.prompt.token_ids,
        n=count,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seed=stable_hash(sampling.seed, request.prompt.id) + request.first,
        stop_token_ids=stop_token_ids,
        # part of the prefix cache's key, so that keys and values of other weights are never reused, nor
        # those of another use, because they differ in rounding
        salt=f"{policy} {sampling.cache}",
        model=model or MODEL_NAME,
        label=None if model is None else str(policy),
        min_p=sampling.truncation.min_p,
        top_k=sampling.truncation.top_k,
        top_p=sampling.truncation.top_p,
        repetition_penalty=sampling.repetition_penalty,
    )


def to_completion(choice: Choice, sampling: Sampling, decode: Callable[[Sequence[int]], str]) -> Completion:
    tokens = tuple(choice.token_ids)
    completion = Completion(
        token_ids=tokens,
        logprobs=tuple(choice.logprobs),
        finish="stop" if choice.finish == "stop" else "length",
        text=decode(tokens),
        versions=tuple(Span(start, stop, int(label)) for label, start, stop in choice.versions),
        source=sampling.source,
        worker=choice.worker,
    )
    return cut_at_stop(completion, sampling.stop, decode) if sampling.stop else completion


def require_supported(sampling: Sampling) -> None:
    """Raises ValueError for a temperature or truncation that a server cannot sample with."""
    if sampling.truncation.top_h is not None or sampling.returns_kept:
        raise ValueError(
            "a vLLM server has no Top-H and does not return the tokens that top-p, top-k and min-p keep; use "
            "rollout.engine vllm or transformers"
        )
    if 0 < sampling.temperature < _MIN_TEMPERATURE:
        raise ValueError(
            f"temperature {sampling.temperature}: vLLM raises it to {_MIN_TEMPERATURE}; use 0 (greedy) or at "
            "least that"
        )
    if sampling.adaptive is not None and sampling.temperature > 0:
        raise ValueError("a vLLM server cannot adapt the temperature of a token; use rollout.engine vllm")
