"""A reward model behind HTTP: one question per prompt, one number per completion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from rltrain.reward import remote
from rltrain.reward.recipe_rules import check_address, check_time_limit
from rltrain.reward.score import RewardInputs, Score, reward

_CONCURRENCY = 16  # a server batches concurrent questions


def check_server(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    yield from check_time_limit(values, recipe)
    yield from check_address(values)


@reward("reward_model_http", scope="group", check=check_server)
def reward_model_http(
    inputs: RewardInputs,
    *,
    url: str = "",
    token_env: str | None = None,
    seconds: float = 8.0,
    protocol: Literal["scores", "vllm_pooling"] = "scores",
    model: str | None = None,
    user_tag: str = "user",
) -> list[Score]:
    """A served reward model's score for each completion, unchanged: any finite number.

    url: the full URL of the endpoint. protocol "scores": POST {"model", "prompt", "completions": [...]} is
    answered by {"scores": [...]}. "vllm_pooling": vLLM's /pooling of a sequence classifier with one label
    (``vllm serve MODEL --runner pooling``), where the prompt is the message of ``user_tag`` and the
    completion the assistant's, in the model's own chat template. model: its served name. token_env: the
    environment variable that holds the bearer token. seconds: time limit for the complete answer, retries
    included; keep it below reward.seconds.

    Ungraded: "unreachable", "timeout", "refused" (4xx), "server_error" (5xx), "malformed". One answer covers
    all of the prompt's completions (with vllm_pooling each has its own). Raises ValueError without a url or
    token.
    """
    endpoint = remote.make_endpoint(url, token_env, seconds, "reward_model_http")
    name = {} if model is None else {"model": model}
    if protocol == "scores":
        question = {**name, "prompt": inputs.prompt, "completions": list(inputs.completions)}
        try:
            return [
                Score(value)
                for value in remote.ask(
                    endpoint, question, lambda answer: _read_scores(answer, len(inputs.completions))
                )
            ]
        except remote.RemoteError as error:
            return [Score(0.0, ungraded=error.reason, why=str(error))] * len(inputs.completions)
    questions = [
        {
            **name,
            "messages": [
                {"role": user_tag, "content": inputs.prompt},
                {"role": "assistant", "content": completion},
            ],
            "task": "classify",
            "use_activation": False,
        }
        for completion in inputs.completions
    ]
    answers = remote.ask_all(endpoint, questions, _read_pooled_score, concurrency=_CONCURRENCY)
    return [
        Score(0.0, ungraded=answer.reason, why=str(answer))
        if isinstance(answer, remote.RemoteError)
        else Score(answer)
        for answer in answers
    ]


def _read_scores(answer: Any, count: int) -> list[float]:
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        raise ValueError('an object {"scores": [...]} is expected')
    if len(answer["scores"]) != count:
        raise ValueError(f"{len(answer['scores'])} scores for {count} completions")
    return [_to_finite_float(value) for value in answer["scores"]]


def _read_pooled_score(answer: Any) -> float:
    """The score in {"data": [{"data": [score]}]}."""
    try:
        ((value,),) = [item["data"] for item in answer["data"]]
    except (TypeError, KeyError) as error:
        raise ValueError('an object {"data": [{"data": [score]}]} is expected') from error
    return _to_finite_float(value)


def _to_finite_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a score must be a finite number, got {value!r:.80}")
    return float(value)
