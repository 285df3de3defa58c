"""Judges that say which of two completions is better: their rewards, a reward model, or the policy itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rltrain.loss.preference.inpo import symmetrise
from rltrain.needs import COMPARES_REWARDS, REF_LOGP
from rltrain.registry import method
from rltrain.reward.score import RewardInputs
from rltrain.rollout.grading import reward_inputs
from rltrain.rollout.model_rewards import LoadScorer, sigmoid
from rltrain.rollout.pairs.pairing import Comparison
from rltrain.types.policy import TokenRows

__all__ = ["JudgeContext", "ModelJudge", "RewardJudge", "SelfJudge"]


@dataclass(frozen=True)
class JudgeContext:
    """What the run provides to its judge.

    log_probs: (R,) nats of each row's completion under the current policy or its reference; rows 2i and 2i
    + 1 of the halves share a prompt. render: a user's message to the token ids of a prompt. decode: token ids
    to text, without special tokens. word: the first token of a word. gather: joins the lists of all ranks.
    reward_model: loads a reward model.
    """

    log_probs: Callable[[TokenRows, Literal["policy", "reference"]], Tensor]
    render: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    word: Callable[[str], int]
    reward_model: LoadScorer
    rank: int
    ranks: int
    gather: Callable[[list[Any]], list[Any]]
    max_tokens: int  # of the longest row that the policy can read


@method("reward", arxiv="2405.07863", traits={COMPARES_REWARDS})
class RewardJudge:
    """The completion with the higher reward is better, as in online DPO with a rule, arXiv:2405.07863.

    Its probability of being better is ``1 - noise``; equal rewards are a tie, 1/2. With ``scale`` the
    probability is Bradley and Terry's ``sigmoid(scale (r_a - r_b))`` instead, for rewards whose differences
    have a meaning.
    """

    def __init__(self, context: JudgeContext, *, noise: float = 0.0, scale: float | None = None) -> None:
        del context
        if not 0 <= noise < 0.5:
            raise ValueError(
                f"pairs.judge reward: noise is {noise:g}, expected [0, 0.5): at 0.5 the verdicts say nothing"
            )
        if scale is not None and (scale <= 0 or noise > 0):
            raise ValueError(
                f"pairs.judge reward: scale is {scale:g} and noise {noise:g}; give a positive scale or noise"
            )
        self._noise = noise
        self._scale = scale

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        probabilities: list[float] = []
        for comparison in comparisons:
            scores = comparison.group.scores
            first = scores[comparison.first].value
            second = scores[comparison.second].value
            probabilities.append(self._probability(first, second))
        return probabilities

    def _probability(self, first: float, second: float) -> float:
        if self._scale is not None:
            return sigmoid(self._scale * (first - second))
        if first == second:
            return 0.5
        return 1 - self._noise if first > second else self._noise


@method("reward_model", arxiv="2203.02155")
class ModelJudge:
    """Bradley and Terry's probability from a reward model's scalars, ``sigmoid(r_a - r_b)``,
    arXiv:2203.02155.

    ``path``, ``prompt_column`` and ``max_tokens`` are those of the reward ``reward_model``. Every rank scores
    its share of the compared completions. A score that is not a finite number gives no verdict, and the pair
    is left out.
    """

    def __init__(
        self,
        context: JudgeContext,
        *,
        path: str = "",
        prompt_column: str | None = None,
        max_tokens: int = 4096,
    ) -> None:
        if not path:
            raise ValueError(
                "pairs.judge reward_model: path is missing; set it to a reward model with one output"
            )
        self._context = context
        self._score = context.reward_model(path, prompt_column=prompt_column, max_tokens=max_tokens)

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        compared: dict[tuple[int, int], None] = {}  # (group id, place), each once, in order of appearance
        inputs: dict[int, RewardInputs] = {}
        for comparison in comparisons:
            group = comparison.group
            if group.group not in inputs:
                inputs[group.group] = reward_inputs(group)
            compared[group.group, comparison.first] = None
            compared[group.group, comparison.second] = None

        places = list(compared)
        ranks = self._context.ranks
        share = places[self._context.rank :: ranks]
        values = self._score([(inputs[group], place) for group, place in share])
        scores: dict[tuple[int, int], float] = {}
        for first, part in enumerate(self._context.gather([np.array(values, np.float64)])):
            scores |= zip(places[first::ranks], part.tolist(), strict=True)

        probabilities: list[float] = []
        for comparison in comparisons:
            group_id = comparison.group.group
            difference = scores[group_id, comparison.first] - scores[group_id, comparison.second]
            probabilities.append(_bradley_terry(difference))
        return probabilities


@method("self", arxiv="2405.14103", needs_if={"by=reference": {REF_LOGP}})
class SelfJudge:
    """The policy itself says which of two answers is better: online self-preferring, arXiv:2405.14103.

    ``template`` is the question, a user's message with {prompt}, {first} and {second}. P(first is better) is
    the softmax over the log-probs of ``first_word`` and ``second_word`` (one token each) as the reply,
    averaged over both orders of the answers, so that a bias towards either place cancels. by "policy": the
    policy before the step's updates; "reference": the frozen model, whose preferences do not drift. A
    question longer than the policy can read gets no verdict. Template and words are our own: those of the
    paper were not read.
    """

    def __init__(
        self,
        context: JudgeContext,
        *,
        template: str = (
            "{prompt}\n\nAnswer A: {first}\nAnswer B: {second}\n\n"  # the question
            "Which answer is better, A or B?"
        ),
        first_word: str = "A",
        second_word: str = "B",
        by: Literal["policy", "reference"] = "policy",
    ) -> None:
        if missing := [name for name in ("{prompt}", "{first}", "{second}") if name not in template]:
            raise ValueError(f"pairs.judge self: template lacks {', '.join(missing)}: {template!r}")
        self._context = context
        self._template = template
        self._by: Literal["policy", "reference"] = by
        self._verdicts = (context.word(first_word), context.word(second_word))
        if self._verdicts[0] == self._verdicts[1]:
            raise ValueError(
                f"pairs.judge self: {first_word!r} and {second_word!r} begin with one token; choose words "
                "that differ"
            )

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        questions: list[tuple[int, ...]] = []  # of each comparison both orders, one after the other
        for comparison in comparisons:
            questions.append(self._question(comparison, comparison.first, comparison.second))
            questions.append(self._question(comparison, comparison.second, comparison.first))

        readable = [
            index for index, question in enumerate(questions) if len(question) < self._context.max_tokens
        ]
        p_shown_first = torch.full((len(questions),), math.nan)
        if readable:
            prompts = tuple(questions[index] for index in readable)
            verdicts = tuple((verdict,) for verdict in self._verdicts for _ in prompts)
            logps = self._context.log_probs(TokenRows((*prompts, *prompts), verdicts), self._by)
            first, second = logps.chunk(2)
            p_shown_first[readable] = torch.sigmoid(first - second)
        return symmetrise(p_shown_first[::2].double(), p_shown_first[1::2].double()).tolist()

    def _question(self, comparison: Comparison, first: int, second: int) -> tuple[int, ...]:
        answers = comparison.group.completions
        prompt = self._context.decode(comparison.group.prompt.token_ids).strip()
        parts = {"{prompt}": prompt, "{first}": answers[first].text, "{second}": answers[second].text}
        return tuple(self._context.render(_fill_template(self._template, parts)))


def _fill_template(template: str, parts: dict[str, str]) -> str:
    """Fills each placeholder once; a placeholder inside an inserted text is left as it is."""
    text = ""
    rest = template
    while places := [(rest.index(name), name) for name in parts if name in rest]:
        start, name = min(places)
        text += rest[:start] + parts[name]
        rest = rest[start + len(name) :]
    return text + rest


def _bradley_terry(difference: float) -> float:
    """Bradley and Terry's probability; NaN, no verdict, where the difference is not a finite number."""
    return sigmoid(difference) if math.isfinite(difference) else math.nan
