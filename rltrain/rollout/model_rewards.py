"""Rewards from a model in the trainer's own processes, beside the rewards from the pool's processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rltrain.reward.combine import distinct_labels
from rltrain.reward.score import RewardInputs, Score, reward

__all__ = ["LoadScorer", "ModelGrader", "ModelReward", "Scorer", "sigmoid"]

# (the completions of a prompt, the place of one of them) to its score, for a sequence of such pairs
Scorer = Callable[[Sequence[tuple[RewardInputs, int]]], list[float]]


class LoadScorer(Protocol):
    """Loads a reward model: ``learner.reward_model.RewardModel`` with device and sizes already bound."""

    def __call__(self, path: str, *, prompt_column: str | None, max_tokens: int) -> Scorer: ...


class PoolGrader(Protocol):
    """The rewards of the pool's processes."""

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]: ...


def check(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    if not values["path"]:
        yield "path is empty; set path to a reward model with one output, a folder or Hub name"
    rollout = getattr(recipe, "rollout", None)
    if rollout is not None and rollout.bound is not None:
        yield "it needs the learner's device while rollout.schedule bounded updates the policy; use {lag: k}"


@reward("reward_model", check=check)
class ModelReward:
    """A reward model's scalar for prompt and completion, as in InstructGPT, arXiv:2203.02155, computed by the
    learner's processes.

    Every rank scores its own samples with a copy of the model that stays on its device, as the reference
    model does. path: a folder or Hub name that ``AutoModelForSequenceClassification`` loads, with one output.
    prompt_column: null: the model reads the policy's own token ids, so its tokenizer must be the policy's
    (models trained by this project's recipes are of this kind); a column of the data, text or messages: the
    model reads it and the completion's text in its own chat template. max_tokens: a longer text loses its
    beginning. squash "sigmoid": maps the score into (0, 1), for a model trained to predict correctness. A
    score that is not a finite number leaves its completion ungraded ("nan").
    """

    def __init__(
        self,
        load: LoadScorer,
        *,
        path: str = "",
        prompt_column: str | None = None,
        max_tokens: int = 4096,
        squash: Literal["none", "sigmoid"] = "none",
    ) -> None:
        self._score = load(path, prompt_column=prompt_column, max_tokens=max_tokens)
        self._squash = squash

    def __call__(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        places = [(inputs, place) for inputs in groups for place in range(len(inputs.completions))]
        values = iter(self._score(places))
        return [[self._to_score(next(values)) for _ in inputs.completions] for inputs in groups]

    def _to_score(self, value: float) -> Score:
        if not math.isfinite(value):
            return Score(0.0, ungraded="nan")
        return Score(sigmoid(value) if self._squash == "sigmoid" else value)


@dataclass(frozen=True)
class ModelGrader:
    """The sum of a pool's scores and the weighted scores of models. A completion that one of them leaves
    ungraded is ungraded.

    pool: None where models give the only rewards. models: (label, weight, reward).
    """

    pool: PoolGrader | None
    models: Sequence[tuple[str, float, ModelReward]]

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        if self.pool is None:
            totals = [[Score(0.0)] * len(inputs.completions) for inputs in groups]
        else:
            totals = self.pool.score(groups)

        labels = distinct_labels([label for label, _, _ in self.models])
        for label, (_, weight, model) in zip(labels, self.models, strict=True):
            scores = model(groups)
            totals = [
                [_add_score(total, label, weight, score) for total, score in zip(*both, strict=True)]
                for both in zip(totals, scores, strict=True)
            ]
        return totals


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _add_score(total: Score, label: str, weight: float, score: Score) -> Score:
    if total.ungraded is not None:
        return total
    if score.ungraded is not None:
        return Score(0.0, ungraded=f"{label}/{score.ungraded}")
    value = total.value + weight * score.value
    return Score(value, {**total.parts, label: score.value}, answer=total.answer)
