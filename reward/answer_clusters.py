"""Answers that mean the same, as clusters, and what a cluster is worth: what EMPO's rewards share."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rltrain.reward import answer_words
from rltrain.reward.score import RewardInputs, Score


@dataclass(frozen=True)
class Rules:
    """What clusters are worth; the hyperparameters of ``empo``."""

    empty: float | None
    all_distinct: Literal["zero", "keep"]
    min_share: float
    copies: Literal["keep", "zero"]
    entropy_low: float | None = None
    entropy_high: float | None = None

    def are_undecided(self, sizes: Sequence[int], entropy: float) -> bool:
        """Whether the answers decide nothing. sizes: of the clusters; entropy: theirs, in nats."""
        count = sum(sizes)
        return (
            (self.all_distinct == "zero" and len(sizes) == count > 1)
            or (max(sizes) / count < self.min_share and len(sizes) > 1)
            or (self.entropy_low is not None and entropy <= self.entropy_low)
            or (self.entropy_high is not None and entropy >= self.entropy_high)
        )


def score_clusters(
    inputs: RewardInputs, answers: Sequence[str | None], clusters: Sequence[int], rules: Rules
) -> list[Score]:
    """The scores of completions from their answers and the cluster of each (``cluster``)."""
    sizes = collections.Counter(clusters)
    entropy = sum(-size / len(answers) * math.log(size / len(answers)) for size in sizes.values()) + 0.0
    is_undecided = rules.are_undecided(list(sizes.values()), entropy)
    parts = {"clusters": float(len(sizes)), "semantic_entropy": entropy}
    scores: list[Score] = []
    for answer, number in zip(answers, clusters, strict=True):
        share = sizes[number] / len(answers)
        if answer is None and rules.empty is not None:
            value = 0.0 if is_undecided and rules.empty > 0 else rules.empty
        elif is_undecided or (
            answer is not None and rules.copies == "zero" and answer.casefold() in inputs.prompt.casefold()
        ):
            value = 0.0
        else:
            value = share
        scores.append(Score(value, {"share": share, **parts}, answer=answers[number]))
    return scores


def cluster(
    answers: Sequence[str | None], find_equal: Callable[[Sequence[str], str], str | None]
) -> list[int]:
    """The cluster of each answer, named by the position of its first member.

    find_equal(members, answer): the first of the clusters' first members that the answer is equivalent to,
    None if there is none. Equal texts need no call; None forms a cluster alone.
    """
    representatives: dict[str, int] = {}  # text of each cluster's first member -> its position
    cluster_of_text: dict[str, int] = {}
    clusters: list[int] = []
    for position, answer in enumerate(answers):
        if answer is None:
            clusters.append(position)
            continue
        if answer not in cluster_of_text:
            member = find_equal(list(representatives), answer) if representatives else None
            cluster_of_text[answer] = position if member is None else representatives[member]
            if member is None:
                representatives[answer] = position
        clusters.append(cluster_of_text[answer])
    return clusters


def first_equal(
    are_equal: Callable[[str, str], bool],
) -> Callable[[Sequence[str], str], str | None]:
    """``find_equal`` of ``cluster`` for a comparison of two answers."""
    return lambda members, answer: next((member for member in members if are_equal(member, answer)), None)


def same_words(first: str, second: str) -> bool:
    return answer_words.normalize_words(first) == answer_words.normalize_words(second) != ""
