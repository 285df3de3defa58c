"""Process rewards of existing completions: the reward of each token and of each step, arXiv:2412.01981."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltrain.advantage.process import aggregate_steps, step_rewards, token_rewards
from rltrain.learner.frozen_logprobs import FrozenLogProbs
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.types.policy import TokenRows

__all__ = ["ScoredRow", "Scorer", "TextRow"]


@dataclass(frozen=True)
class TextRow:
    """A completion to be scored."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    step: tuple[int, ...]  # of each completion token, from 0
    steps: int  # number of steps, including those without a token


@dataclass(frozen=True)
class ScoredRow:
    """Rewards in units of beta times nats."""

    score: float  # the steps' rewards, aggregated
    tokens: list[float]  # reward of each token
    steps: list[float]  # R_k, summed over the tokens of step k
    values: list[float]  # Q_k, summed over the tokens up to step k; the last is the completion's reward

    def columns(self, *, with_tokens: bool) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "score": self.score,
            "step_rewards": self.steps,
            "step_values": self.values,
        }
        return columns | ({"token_rewards": self.tokens} if with_tokens else {})


@dataclass(frozen=True)
class Scorer:
    """A process reward model and its reference. beta: the coefficient of every reward.

    aggregate: hyperparameters of ``aggregate_steps`` that differ from its defaults. rows: number of
    completions that the models score at once.
    """

    learner: PreferenceLearner
    reference: FrozenLogProbs | None  # None: the rewards are log-probs instead of log-ratios
    beta: float
    aggregate: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 512

    def score(
        self, texts: Sequence[TextRow], done: Callable[[int], None] = lambda count: None
    ) -> list[ScoredRow]:
        """The rewards of ``texts``, in their order. done: called repeatedly with the number scored."""
        scored: list[ScoredRow] = []
        for start in range(0, len(texts), self.rows):
            scored += self._score_chunk(texts[start : start + self.rows])
            done(len(scored))
        return scored

    def _score_chunk(self, texts: Sequence[TextRow]) -> list[ScoredRow]:
        rows = TokenRows(tuple(text.prompt for text in texts), tuple(text.completion for text in texts))
        logp = self.learner.token_log_probs(rows)
        ref_logp = torch.zeros_like(logp) if self.reference is None else self.reference.token_log_probs(rows)
        step_id = torch.full(logp.shape, -1, dtype=torch.int64)
        for row, text in enumerate(texts):
            step_id[row, : len(text.step)] = torch.tensor(text.step, dtype=torch.int64)
        rewards = token_rewards(logp.double(), ref_logp.double(), step_id >= 0, self.beta)
        steps, present = step_rewards(rewards, step_id)
        scores = aggregate_steps(steps, present, **self.aggregate)
        return [_scored_row(texts[row], scores[row], rewards[row], steps[row]) for row in range(len(texts))]


def _scored_row(text: TextRow, score: Tensor, rewards: Tensor, steps: Tensor) -> ScoredRow:
    missing = max(text.steps - len(steps), 0)  # last steps, which have no token
    padded = torch.cat([steps, steps.new_zeros(missing)])[: text.steps]
    return ScoredRow(
        score.item(), rewards[: len(text.completion)].tolist(), padded.tolist(), padded.cumsum(0).tolist()
    )
