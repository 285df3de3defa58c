"""Sampled completions to preference pairs: what is compared, who is said to have won, and what is
left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

import torch
from torch import Tensor

from rltrain.loss.preference.mmpo import ranked_pair_strengths
from rltrain.seeds import stable_hash
from rltrain.types.policy import TokenRows
from rltrain.types.preference import CompletionFacts, PairBatch
from rltrain.types.samples import ScoredGroup

__all__ = [
    "Choose",
    "Comparison",
    "Judge",
    "JudgedPair",
    "JudgedPairs",
    "Pairing",
    "choose_pairs",
    "compare_completions",
    "pair_batch",
    "usable",
]

Choose = Literal["disjoint", "best_worst", "ranked"]
Preferences = Mapping[tuple[int, int], float]  # of completions i and j of a group: P(i is better than j)


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt, by their place in the group."""

    group: ScoredGroup
    first: int
    second: int


class Judge(Protocol):
    """Says which of two completions is better."""

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        """P(first is better than second) of each, equal on every rank; with the two exchanged, 1 less it.
        NaN: no verdict.

        Every rank calls it with the same comparisons; it may be a collective.
        """
        ...


@dataclass(frozen=True)
class JudgedPair:
    """Rows are those of the step: all completions of all its groups, in order."""

    group: int
    chosen: int  # row
    rejected: int  # row
    p_chosen: float  # the judge's probability that chosen is the better one
    margin: float  # reward of chosen less that of rejected, whoever judged


@dataclass(frozen=True)
class JudgedPairs:
    pairs: tuple[JudgedPair, ...]
    prompts: int  # of the step, with or without a pair
    compared: int  # questions put to the judge
    dropped: Mapping[str, int] = field(
        default_factory=dict
    )  # pairs by reason: "tied", "identical", "unjudged"

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, rows: TokenRows) -> TokenRows:
        """Of the step's rows those of the pairs: all that are chosen, then all that are rejected."""
        return rows.rows(
            torch.tensor([pair.chosen for pair in self.pairs] + [pair.rejected for pair in self.pairs])
        )

    def picked(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) each, of values (B,) of the step's rows."""
        return values[[pair.chosen for pair in self.pairs]], values[[pair.rejected for pair in self.pairs]]

    def metrics(self, lengths: Tensor) -> dict[str, float]:
        """How many pairs there are and what speaks from them. lengths: (B,) tokens of the step's rows."""
        count, chosen_prompts = max(len(self), 1), {pair.group for pair in self.pairs}
        longer, shorter = self.picked(lengths)
        return {
            "pairs/count": float(len(self)),
            "pairs/prompts": len(chosen_prompts) / max(self.prompts, 1),
            "pairs/compared": float(self.compared),
            "pairs/tied": float(self.dropped.get("tied", 0)),
            "pairs/identical": float(self.dropped.get("identical", 0)),
            "pairs/unjudged": float(self.dropped.get("unjudged", 0)),
            "pairs/p_chosen": sum(pair.p_chosen for pair in self.pairs) / count,
            "pairs/reward_margin": sum(pair.margin for pair in self.pairs) / count,
            "pairs/chosen_longer": float((longer > shorter).sum()) / count,
        }


@dataclass(frozen=True)
class Pairing:
    """A recipe's way from groups to pairs.

    choose: which completions are compared and paired (``compared``, ``paired``). verdict "likelier": the one
    that the judge thinks more probably better is chosen; "drawn": one drawn with that probability, as the
    regressions of INPO and Nash-MP need where the judge is not sure. Pairs whose probability is nearer to 1/2
    than ``tolerance`` are left out, as are exact ties where none is drawn, pairs of equal token ids, and
    pairs without a verdict.
    """

    judge: Judge
    choose: Choose
    verdict: Literal["likelier", "drawn"]
    tolerance: float
    seed: int

    def __call__(self, groups: Sequence[ScoredGroup], step: int) -> JudgedPairs:
        able = [usable(group) for group in groups]
        questions = [
            Comparison(group, *both)
            for group, ones in zip(groups, able, strict=True)
            for both in compare_completions(self.choose, ones)
        ]
        answers = iter(self.judge.prefers(questions))
        pairs: list[JudgedPair] = []
        dropped: Counter[str] = Counter()
        first_row = 0
        for group, ones in zip(groups, able, strict=True):
            preferences = {both: next(answers) for both in compare_completions(self.choose, ones)}
            random = Random(stable_hash(self.seed, "verdict", step, group.group))
            for better, worse, p in choose_pairs(self.choose, ones, preferences):
                if (reason := self._refused(group, better, worse, p)) is not None:
                    dropped[reason] += 1
                    continue
                if p < 0.5 if self.verdict == "likelier" else random.random() >= p:
                    better, worse, p = worse, better, 1 - p
                margin = group.scores[better].value - group.scores[worse].value
                pairs.append(JudgedPair(group.group, first_row + better, first_row + worse, p, margin))
            first_row += len(group.completions)
        return JudgedPairs(tuple(pairs), len(groups), len(questions), dict(dropped))

    def _refused(self, group: ScoredGroup, better: int, worse: int, p: float) -> str | None:
        if group.completions[better].token_ids == group.completions[worse].token_ids:
            return "identical"
        if math.isnan(p):
            return "unjudged"
        if abs(p - 0.5) < self.tolerance or (p == 0.5 and self.verdict == "likelier"):
            return "tied"
        return None


def usable(group: ScoredGroup) -> list[int]:
    """Places of the completions that may stand in a pair: whole, and graded."""
    pairs = enumerate(zip(group.completions, group.scores, strict=True))
    return [
        at
        for at, (one, score) in pairs
        if one.token_ids and one.finish != "aborted" and score.ungraded is None
    ]


def compare_completions(choose: Choose, able: Sequence[int]) -> list[tuple[int, int]]:
    """Which completions are put before the judge: neighbours, everyone with everyone, or everyone
    with the first.
    """
    if choose == "disjoint":
        return list(zip(able[::2], able[1::2], strict=False))
    if choose == "ranked":
        return [(at, able[0]) for at in able[1:]]
    return [(first, second) for place, first in enumerate(able) for second in able[place + 1 :]]


def choose_pairs(
    choose: Choose, able: Sequence[int], preferences: Preferences
) -> list[tuple[int, int, float]]:
    """(i, j, P(i is better than j)) of the pairs made of those comparisons.

    disjoint: the comparisons as they are, of independent samples. best_worst: of a tournament, whoever has
    the highest mean preference over the others, and whoever has the lowest. ranked: every pair, its strength
    from both sides' preference over the first completion (``ranked_pair_strengths``), which itself has 1/2.
    What has no verdict counts for neither; NaN where nothing has.
    """
    if choose == "disjoint":
        return [(first, second, p) for (first, second), p in preferences.items()]
    if len(able) < 2:
        return []
    if choose == "ranked":
        judged = [able[0], *(at for at in able[1:] if not math.isnan(preferences[at, able[0]]))]
        if len(judged) < 2:
            return [(able[0], able[-1], math.nan)]
        rates = torch.tensor([0.5, *(preferences[at, able[0]] for at in judged[1:])], dtype=torch.float64)
        places, strengths = ranked_pair_strengths(rates)
        return [
            (judged[i], judged[j], p) for (i, j), p in zip(places.tolist(), strengths.tolist(), strict=True)
        ]
    beats = dict(preferences) | {(second, first): 1 - p for (first, second), p in preferences.items()}
    verdicts = {
        one: [p for other in able if other != one and not math.isnan(p := beats[one, other])] for one in able
    }
    rates = {one: sum(found) / len(found) for one, found in verdicts.items() if found}
    if not rates:
        return [(able[0], able[-1], math.nan)]
    best, worst = max(rates, key=lambda one: rates[one]), min(reversed(rates), key=lambda one: rates[one])
    return [(best, worst, beats[best, worst])] if rates[best] > rates[worst] else [(able[0], able[-1], 0.5)]


def pair_batch(judged: JudgedPairs, lengths: Tensor, facts: Mapping[str, tuple[Tensor, Tensor]]) -> PairBatch:
    """The optimizer batch. lengths: (B,) of the step's rows. facts: (N,) of chosen and of rejected,
    by field of CompletionFacts.
    """
    chosen, rejected = (
        CompletionFacts(length, **{name: both[side] for name, both in facts.items()})
        for side, length in enumerate(judged.picked(lengths))
    )
    return PairBatch(
        chosen,
        rejected,
        prompt=torch.tensor([pair.group for pair in judged.pairs]),
        margin=torch.tensor([pair.margin for pair in judged.pairs], dtype=torch.float32),
        p_chosen=torch.tensor([pair.p_chosen for pair in judged.pairs], dtype=torch.float32),
    )
