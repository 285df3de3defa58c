"""What a worker answered to a request, and every check that it must pass before the learner sees it.

An answer that fails costs no sample silently: the request is sent again. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.rollout.worker.guard import Choice

__all__ = ["GarbageAnswer", "GenerateRequest", "check_choices", "parse_json_answer"]

# A log-prob may exceed 0 by rounding. vLLM writes -9999 for NaN and minus infinity.
_MAX_LOGPROB = 1e-6
_MIN_LOGPROB = -9999.0
_JSON_PREFIX = "generate-tokens-"  # vLLM's own, before the request's id
_FINISHES = ("stop", "length", "abort")


class GarbageAnswer(RuntimeError):
    """An answer that no sound worker gives."""


@dataclass(frozen=True)
class GenerateRequest:
    """Completions of one prompt: samples with the seeds ``seed`` to ``seed + n - 1``.

    salt: part of the prefix cache's key. stop_token_ids: ascending, every EOS id among them. label: of the
    version that ``model`` is, where that is an adapter, or the base beside adapters; the guard repeats it.
    """

    id: str
    token_ids: Sequence[int]
    n: int
    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: Sequence[int]
    salt: str
    model: str
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    priority: int = 0
    label: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON of both routes. vLLM ignores names that it does not know, hence no others exist here."""
        labels = {} if self.label is None else {"label": self.label}
        return {
            **labels,
            "request_id": self.id,
            "model": self.model,
            "token_ids": list(self.token_ids),
            "cache_salt": self.salt,
            "priority": self.priority,
            "sampling_params": {
                "n": self.n,
                "temperature": self.temperature,
                "min_p": self.min_p,
                "top_k": self.top_k,
                "top_p": self.top_p,
                "repetition_penalty": self.repetition_penalty,
                "max_tokens": self.max_tokens,
                "seed": self.seed,
                "logprobs": 0,  # of the sampled token only
                "stop_token_ids": list(self.stop_token_ids),
                "ignore_eos": True,  # the ids above include every EOS
                "detokenize": False,
            },
        }


def parse_json_answer(body: bytes) -> tuple[str, list[Choice]]:
    """(request id, choices) of vLLM's own route ``/inference/v1/generate``.

    Raises GarbageAnswer for an answer of another form, and where the log-probs are another token's.
    """
    try:
        data = json.loads(body)
        choices = [_parse_choice(entry) for entry in data["choices"]]
        return str(data["request_id"]).removeprefix(_JSON_PREFIX), choices
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GarbageAnswer(f"its JSON cannot be read: {type(error).__name__}: {error}") from error


def _parse_choice(entry: Mapping[str, Any]) -> Choice:
    content = entry["logprobs"]["content"]
    tokens = [int(token) for token in entry["token_ids"]]
    named = [int(item["token_id"]) for item in content]
    if named != tokens:
        raise GarbageAnswer(f"its log-probs are those of tokens {named[:8]}, its tokens are {tokens[:8]}")
    spans = [
        (str(span["version"]), int(span["start"]), int(span["end"])) for span in entry["weight_versions"]
    ]
    logprobs = [float(item["logprob"]) for item in content]
    return Choice(int(entry["index"]), tokens, logprobs, entry["finish_reason"], entry["stop_reason"], spans)


def check_choices(
    request: GenerateRequest,
    request_id: str,
    choices: Sequence[Choice],
    *,
    vocabulary: int,
    labels: Collection[str],
) -> list[Choice]:
    """The choices in the order of their samples. Raises GarbageAnswer unless every one is sound.

    vocabulary: number of token ids. labels: of the weights that may have sampled the tokens.
    """
    if request_id != request.id:
        raise GarbageAnswer(f"it answers request {request_id!r}, not {request.id!r}")
    ordered = sorted(choices, key=lambda choice: choice.index)
    if [choice.index for choice in ordered] != list(range(request.n)):
        indexes = [choice.index for choice in choices]
        raise GarbageAnswer(
            f"its choices have the numbers {indexes}; expected 0 to {request.n - 1}, once each"
        )
    for choice in ordered:
        problem = (
            _token_problem(choice, vocabulary)
            or _finish_problem(choice, request)
            or _version_problem(choice, labels)
        )
        if problem:
            raise GarbageAnswer(f"choice {choice.index}: {problem}")
    return ordered


def _token_problem(choice: Choice, vocabulary: int) -> str:
    """What is wrong with tokens and log-probs; empty: nothing."""
    tokens = choice.token_ids
    if not len(tokens) == len(choice.logprobs) >= 1:
        return f"{len(tokens)} tokens and {len(choice.logprobs)} log-probs; expected one each, at least one"
    for token in tokens:
        if not 0 <= token < vocabulary:
            return f"token {token} is outside of the vocabulary of {vocabulary}"
    for logprob in choice.logprobs:
        if not (math.isfinite(logprob) and _MIN_LOGPROB < logprob <= _MAX_LOGPROB):
            return f"a log-prob of {logprob}: the server's logits were not finite"
    return ""


def _finish_problem(choice: Choice, request: GenerateRequest) -> str:
    """What is wrong with the end of the completion; empty: nothing."""
    stop = set(request.stop_token_ids)
    length = len(choice.token_ids)
    if choice.finish not in _FINISHES:
        return f"it finished by {choice.finish!r}; expected one of {', '.join(_FINISHES)}"
    if length > request.max_tokens:
        return f"{length} tokens where {request.max_tokens} were asked for"
    if not stop.isdisjoint(choice.token_ids[:-1]):
        return "a stop token stands before its end"
    is_stop = choice.token_ids[-1] in stop
    if choice.finish == "stop" and not is_stop:
        return f"it finished by stop, but its last token {choice.token_ids[-1]} is no stop token"
    if choice.finish == "length" and (is_stop or length != request.max_tokens):
        return f"it finished by length after {length} of {request.max_tokens} tokens"
    return ""


def _version_problem(choice: Choice, labels: Collection[str]) -> str:
    """What is wrong with the versions of its tokens; empty: nothing."""
    end = 0
    for label, start, stop in choice.versions:
        if start != end or stop <= start:
            return f"its versions {list(choice.versions)} leave a gap or overlap"
        if label not in labels:
            return f"tokens {start} to {stop} by weights {label!r}; this worker was sent {sorted(labels)}"
        end = stop
    if end != len(choice.token_ids):
        return f"its versions {list(choice.versions)} do not cover its {len(choice.token_ids)} tokens"
    return ""
