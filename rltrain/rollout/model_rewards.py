"""Rewards that a model in the trainer's own processes gives, beside those of the pool's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from reward.combine import distinct_labels
from reward.score import RewardInputs, Score, reward

__all__ = ["LoadScorer", "ModelGrader", "ModelReward", "Scorer", "sigmoid"]

Scorer = Callable[
    [Sequence[tuple[RewardInputs, int]]], list[float]
]  # a number for each of (a prompt's completions, which of them)


class LoadScorer(Protocol):
    """Loads a reward model: ``learner.reward_model.RewardModel`` with its device and sizes in place."""

    def __call__(self, path: str, *, prompt_column: str | None, max_tokens: int) -> Scorer: ...


class PoolGrader(Protocol):
    """The rewards of the pool's processes."""

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]: ...


@reward("reward_model")
class ModelReward:
    """A reward model's scalar of prompt and completion, as in InstructGPT, arXiv:2203.02155, computed by the
    learner's processes.

    Every rank scores what it has sampled, with a copy of the model that stays on its device as the reference
    does. path: a folder or Hub name that ``AutoModelForSequenceClassification`` loads, with one output.
    prompt_column: null, the model reads the policy's own token ids (its tokenizer must be the policy's;
    models trained by this project's recipes read them so); a column of the data, text or messages: that and
    the completion's text in the model's own chat template. max_tokens: of a longer text the beginning is left
    out. squash "sigmoid": into (0, 1), for a model that was trained to say what is right. A score that is no
    number leaves its completion ungraded ("nan").
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
        self._score, self._squash = load(path, prompt_column=prompt_column, max_tokens=max_tokens), squash

    def __call__(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        values = iter(
            self._score([(inputs, at) for inputs in groups for at in range(len(inputs.completions))])
        )
        return [[self._one(next(values)) for _ in inputs.completions] for inputs in groups]

    def _one(self, value: float) -> Score:
        if not math.isfinite(value):
            return Score(0.0, ungraded="nan")
        return Score(sigmoid(value) if self._squash == "sigmoid" else value)


@dataclass(frozen=True)
class ModelGrader:
    """A pool's scores plus those of models, each times its weight. A completion that one of them leaves
    ungraded is ungraded.

    pool: None where there are no others. models: (label, weight, reward).
    """

    pool: PoolGrader | None
    models: Sequence[tuple[str, float, ModelReward]]

    def score(self, groups: Sequence[RewardInputs]) -> list[list[Score]]:
        found = (
            [[Score(0.0)] * len(inputs.completions) for inputs in groups]
            if self.pool is None
            else self.pool.score(groups)
        )
        labels = distinct_labels([label for label, _, _ in self.models])
        for label, (_, weight, model) in zip(labels, self.models, strict=True):
            given = model(groups)
            found = [
                [_plus(one, label, weight, more) for one, more in zip(*both, strict=True)]
                for both in zip(found, given, strict=True)
            ]
        return found


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _plus(score: Score, label: str, weight: float, more: Score) -> Score:
    if score.ungraded is not None:
        return score
    if more.ungraded is not None:
        return Score(0.0, ungraded=f"{label}/{more.ungraded}")
    return Score(score.value + weight * more.value, {**score.parts, label: more.value}, answer=score.answer)
