"""From sampled completions to preference pairs: which are compared, which of two is chosen, and which pairs
are left out.
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
    "usable_places",
]

Choose = Literal["disjoint", "best_worst", "ranked"]
Preferences = Mapping[tuple[int, int], float]  # of completions i and j of a group: P(i is better than j)


@dataclass(frozen=True)
class Comparison:
    """Two completions of the same prompt, by their places in the group."""

    group: ScoredGroup
    first: int
    second: int


class Judge(Protocol):
    """Says which of two completions is better."""

    def prefers(self, comparisons: Sequence[Comparison]) -> list[float]:
        """P(first is better than second) for each comparison, equal on every rank; NaN where the judge
        reaches no verdict.

        Exchanging the two gives 1 less that probability. Every rank calls this with the same comparisons; it
        may be a collective.
        """
        ...


@dataclass(frozen=True)
class JudgedPair:
    """A preference pair. A row is a position among all completions of all the step's groups, in order."""

    group: int
    chosen: int  # row
    rejected: int  # row
    p_chosen: float  # the judge's probability that the chosen completion is better
    margin: (
        float  # reward of the chosen completion less that of the rejected, also where rewards do not judge
    )


@dataclass(frozen=True)
class JudgedPairs:
    """The pairs of one step, and counts of the comparisons they come from."""

    pairs: tuple[JudgedPair, ...]
    prompts: int  # of the step, with or without a pair
    compared: int  # comparisons that the judge was asked for
    dropped: Mapping[str, int] = field(default_factory=dict)  # pairs by reason: tied, identical, unjudged

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, rows: TokenRows) -> TokenRows:
        """The token rows of the pairs: all chosen completions, then all rejected. rows: those of the step."""
        chosen = [pair.chosen for pair in self.pairs]
        rejected = [pair.rejected for pair in self.pairs]
        return rows.rows(torch.tensor(chosen + rejected))

    def select_sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(values of the chosen completions (N,), values of the rejected (N,)). values: (B,), of the step's
        rows.
        """
        return values[[pair.chosen for pair in self.pairs]], values[[pair.rejected for pair in self.pairs]]

    def metrics(self, lengths: Tensor) -> dict[str, float]:
        """Counts and means of the pairs. lengths: (B,) tokens of the step's rows."""
        count = max(len(self), 1)
        paired_groups = {pair.group for pair in self.pairs}
        longer, shorter = self.select_sides(lengths)
        return {
            "pairs/count": float(len(self)),
            "pairs/prompts": len(paired_groups) / max(self.prompts, 1),
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
    """Makes the pairs of a step from its groups, as the recipe says.

    choose: which completions are compared and paired (``compare_completions``, ``choose_pairs``). verdict
    "likelier": the completion that the judge holds more probably better is chosen; "drawn": the chosen
    completion is drawn with that probability, as the regressions of INPO and Nash-MP need where the judge is
    not sure. Pairs whose probability is nearer to 1/2 than ``tolerance`` are left out. So are exact ties
    unless the verdict is "drawn", pairs of equal token ids, and pairs without a verdict.
    """

    judge: Judge
    choose: Choose
    verdict: Literal["likelier", "drawn"]
    tolerance: float
    seed: int

    def __call__(self, groups: Sequence[ScoredGroup], step: int) -> JudgedPairs:
        usable = [usable_places(group) for group in groups]
        comparisons = [
            Comparison(group, first, second)
            for group, places in zip(groups, usable, strict=True)
            for first, second in compare_completions(self.choose, places)
        ]
        probabilities = iter(self.judge.prefers(comparisons))

        pairs: list[JudgedPair] = []
        dropped: Counter[str] = Counter()
        first_row = 0
        for group, places in zip(groups, usable, strict=True):
            preferences = {both: next(probabilities) for both in compare_completions(self.choose, places)}
            random = Random(stable_hash(self.seed, "verdict", step, group.group))
            for better, worse, p in choose_pairs(self.choose, places, preferences):
                if (reason := self._why_dropped(group, better, worse, p)) is not None:
                    dropped[reason] += 1
                    continue
                if p < 0.5 if self.verdict == "likelier" else random.random() >= p:
                    better, worse, p = worse, better, 1 - p
                margin = group.scores[better].value - group.scores[worse].value
                pairs.append(JudgedPair(group.group, first_row + better, first_row + worse, p, margin))
            first_row += len(group.completions)
        return JudgedPairs(tuple(pairs), len(groups), len(comparisons), dict(dropped))

    def _why_dropped(self, group: ScoredGroup, better: int, worse: int, p: float) -> str | None:
        if group.completions[better].token_ids == group.completions[worse].token_ids:
            return "identical"
        if math.isnan(p):
            return "unjudged"
        if abs(p - 0.5) < self.tolerance or (p == 0.5 and self.verdict == "likelier"):
            return "tied"
        return None


def usable_places(group: ScoredGroup) -> list[int]:
    """Places in the group of the completions that a pair may contain: complete and graded."""
    places: list[int] = []
    for place, (completion, score) in enumerate(zip(group.completions, group.scores, strict=True)):
        if completion.token_ids and completion.finish != "aborted" and score.ungraded is None:
            places.append(place)
    return places


def compare_completions(choose: Choose, places: Sequence[int]) -> list[tuple[int, int]]:
    """The comparisons that the judge is asked for: of neighbours (disjoint), of each with the first (ranked),
    or of each with every other (best_worst). places: the usable completions of a group.
    """
    if choose == "disjoint":
        return list(zip(places[::2], places[1::2], strict=False))
    if choose == "ranked":
        return [(place, places[0]) for place in places[1:]]
    return [(first, second) for index, first in enumerate(places) for second in places[index + 1 :]]


def choose_pairs(
    choose: Choose, places: Sequence[int], preferences: Preferences
) -> list[tuple[int, int, float]]:
    """(i, j, P(i is better than j)) of the pairs made from those comparisons.

    disjoint: the comparisons themselves, of independent samples. best_worst: the completion with the highest
    mean preference over the others, and the one with the lowest. ranked: every pair, its strength computed
    from both sides' preference over the first completion (``ranked_pair_strengths``), whose own is 1/2. A
    comparison without a verdict counts for neither side; NaN where no comparison has one.
    """
    if choose == "disjoint":
        return [(first, second, p) for (first, second), p in preferences.items()]
    if len(places) < 2:
        return []
    if choose == "ranked":
        return _ranked_pairs(places, preferences)
    return [_best_and_worst(places, preferences)]


def _ranked_pairs(places: Sequence[int], preferences: Preferences) -> list[tuple[int, int, float]]:
    first = places[0]
    judged = [first, *(place for place in places[1:] if not math.isnan(preferences[place, first]))]
    if len(judged) < 2:
        return [(first, places[-1], math.nan)]
    rates = torch.tensor([0.5, *(preferences[place, first] for place in judged[1:])], dtype=torch.float64)
    indices, strengths = ranked_pair_strengths(rates)
    return [(judged[i], judged[j], p) for (i, j), p in zip(indices.tolist(), strengths.tolist(), strict=True)]


def _best_and_worst(places: Sequence[int], preferences: Preferences) -> tuple[int, int, float]:
    """A pair of the first and the last completion, with 1/2 for a tie, where none is best."""
    beats = dict(preferences) | {(second, first): 1 - p for (first, second), p in preferences.items()}
    rates: dict[int, float] = {}
    for place in places:
        verdicts = [beats[place, other] for other in places if other != place]
        verdicts = [p for p in verdicts if not math.isnan(p)]
        if verdicts:
            rates[place] = sum(verdicts) / len(verdicts)
    if not rates:
        return places[0], places[-1], math.nan
    best = max(rates, key=lambda place: rates[place])
    worst = min(reversed(rates), key=lambda place: rates[place])
    if rates[best] > rates[worst]:
        return best, worst, beats[best, worst]
    return places[0], places[-1], 0.5


def pair_batch(judged: JudgedPairs, lengths: Tensor, facts: Mapping[str, tuple[Tensor, Tensor]]) -> PairBatch:
    """The optimizer batch of the pairs. lengths: (B,) tokens of the step's rows. facts: by field of
    CompletionFacts, (N,) of the chosen completions and (N,) of the rejected.
    """
    chosen, rejected = (
        CompletionFacts(length, **{name: both[side] for name, both in facts.items()})
        for side, length in enumerate(judged.select_sides(lengths))
    )
    return PairBatch(
        chosen,
        rejected,
        prompt=torch.tensor([pair.group for pair in judged.pairs]),
        margin=torch.tensor([pair.margin for pair in judged.pairs], dtype=torch.float32),
        p_chosen=torch.tensor([pair.p_chosen for pair in judged.pairs], dtype=torch.float32),
    )
