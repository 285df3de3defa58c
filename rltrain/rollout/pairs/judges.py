"""Who says which of two completions is better: their rewards, a reward model, or the policy itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rltrain.loss.preference.inpo import symmetrise
from rltrain.registry import method
from rltrain.rollout.grading import reward_inputs
from rltrain.rollout.model_rewards import LoadScorer, sigmoid
from rltrain.rollout.pairs.pairing import Comparison
from rltrain.types.policy import TokenRows

__all__ = ["JudgeContext", "ModelJudge", "RewardJudge", "SelfJudge"]


@dataclass(frozen=True)
class JudgeContext:
    """What judges draw on.

    log_probs: (R,) nats of each row's completion, by the policy as it is or by its reference; rows 2i and 2i
    + 1 of the halves share a prompt. render: a user's message to the token ids of a prompt. decode: token ids
    to text, without special tokens. word: the one token that spells a word. gather: lists of all ranks,
    joined. reward_model: loads one.
    """

    log_probs: Callable[[TokenRows, Literal["policy", "reference"]], Tensor]
    render: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    word: Callable[[str], int]
    reward_model: LoadScorer
    rank: int
    ranks: int
    gather: Callable[[list[Any]], list[Any]]
    most_tokens: int  # of a row that the policy can read


@method("reward", arxiv="2405.07863")
class RewardJudge:
    """The completion with the higher reward is the better one, as in online DPO with a rule,
    arXiv:2405.07863.

    It is sure of that with probability ``1 - noise``; equal rewards are a tie, 1/2. ``scale`` in place of
    that rule: Bradley and Terry's ``sigmoid(scale (r_a - r_b))``, for rewards whose differences mean
    something.
    """

    def __init__(self, means: JudgeContext, *, noise: float = 0.0, scale: float | None = None) -> None:
        del means
        if not 0 <= noise < 0.5:
            raise ValueError(
                f"pairs.judge reward: noise is {noise:g}, expected [0, 0.5): at 0.5 the verdicts say nothing"
            )
        if scale is not None and (scale <= 0 or noise > 0):
            raise ValueError(
                f"pairs.judge reward: scale is {scale:g} and noise {noise:g}; give a positive scale or noise"
            )
        self._noise, self._scale = noise, scale

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        return [
            self._one(one.group.scores[one.first].value, one.group.scores[one.second].value)
            for one in comparisons
        ]

    def _one(self, first: float, second: float) -> float:
        if self._scale is not None:
            return sigmoid(self._scale * (first - second))
        if first == second:
            return 0.5
        return 1 - self._noise if first > second else self._noise


@method("reward_model", arxiv="2203.02155")
class ModelJudge:
    """Bradley and Terry's probability from a reward model's scalars, ``sigmoid(r_a - r_b)``,
    arXiv:2203.02155.

    ``path``, ``prompt_column`` and ``max_tokens``: as for the reward of that name. Every rank scores its
    share of the completions that are compared. Where a score is no number there is no verdict, and the pair
    is left out.
    """

    def __init__(
        self, means: JudgeContext, *, path: str = "", prompt_column: str | None = None, max_tokens: int = 4096
    ) -> None:
        if not path:
            raise ValueError(
                "pairs.judge reward_model: path is missing; set it to a reward model with one output"
            )
        self._means, self._score = (
            means,
            means.reward_model(path, prompt_column=prompt_column, max_tokens=max_tokens),
        )

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        asked = {
            (one.group.group, at): (one.group, at) for one in comparisons for at in (one.first, one.second)
        }
        inputs = {group.group: reward_inputs(group) for group, _ in asked.values()}
        mine = list(asked)[self._means.rank :: self._means.ranks]
        found = self._score([(inputs[group], at) for group, at in mine])
        scores = dict(self._means.gather(list(zip(mine, found, strict=True))))
        return [
            _sure(scores[one.group.group, one.first] - scores[one.group.group, one.second])
            for one in comparisons
        ]


@method("self", arxiv="2405.14103")
class SelfJudge:
    """The policy asked which of two answers is better, the heart of online self-preferring, arXiv:2405.14103.

    ``template`` is the question, with {prompt}, {first} and {second}, put as a user's message. P(first is
    better) is the softmax over the log-probs of ``first_word`` and ``second_word`` (one token each) as the
    reply, averaged over both orders of the answers, so that a bias to either place cancels. by "policy": as
    it is before the step's updates; "reference": the frozen model, whose taste does not drift. There is no
    verdict on a question longer than the policy can read. Wording and words are ours: the paper's were not
    read.
    """

    def __init__(
        self,
        means: JudgeContext,
        *,
        template: str = "{prompt}\n\nAnswer A: {first}\nAnswer B: {second}\n\nWhich answer is better, A or B?",
        first_word: str = "A",
        second_word: str = "B",
        by: Literal["policy", "reference"] = "policy",
    ) -> None:
        if missing := [name for name in ("{prompt}", "{first}", "{second}") if name not in template]:
            raise ValueError(f"pairs.judge self: template lacks {', '.join(missing)}: {template!r}")
        self._means, self._template = means, template
        self._by: Literal["policy", "reference"] = by
        self._verdicts = (means.word(first_word), means.word(second_word))
        if self._verdicts[0] == self._verdicts[1]:
            raise ValueError(
                f"pairs.judge self: {first_word!r} and {second_word!r} begin with one token; choose words "
                "that differ"
            )

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        questions = [
            self._question(one, *order)
            for one in comparisons
            for order in ((one.first, one.second), (one.second, one.first))
        ]
        readable = [at for at, question in enumerate(questions) if len(question) < self._means.most_tokens]
        shown_first = torch.full((len(questions),), math.nan)
        if readable:
            prompts = tuple(questions[at] for at in readable)
            verdicts = tuple((verdict,) for verdict in self._verdicts for _ in prompts)
            first, second = self._means.log_probs(TokenRows((*prompts, *prompts), verdicts), self._by).chunk(
                2
            )
            shown_first[readable] = torch.sigmoid(first - second)
        return symmetrise(shown_first[::2].double(), shown_first[1::2].double()).tolist()

    def _question(self, one: Comparison, first: int, second: int) -> tuple[int, ...]:
        answers = one.group.completions
        asked = self._means.decode(one.group.prompt.token_ids).strip()
        parts = {"{prompt}": asked, "{first}": answers[first].text, "{second}": answers[second].text}
        return tuple(self._means.render(_filled(self._template, parts)))


def _filled(template: str, parts: dict[str, str]) -> str:
    """Each place filled once: what an answer holds is not looked at."""
    found, rest = "", template
    while places := [(rest.index(name), name) for name in parts if name in rest]:
        at, name = min(places)
        found, rest = found + rest[:at] + parts[name], rest[at + len(name) :]
    return found + rest


def _sure(difference: float) -> float:
    """Bradley and Terry's probability; NaN, no verdict, where there is no difference to speak of."""
    return sigmoid(difference) if math.isfinite(difference) else math.nan
