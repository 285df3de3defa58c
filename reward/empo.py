"""A reward without labels: the share of the prompt's completions with the same meaning."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rltrain.reward import answer_text, answer_words, math_answer
from rltrain.reward.score import RewardInputs, Score, reward


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


@reward("empo", scope="group", traits={"reports_answer"})
def empo(
    inputs: RewardInputs,
    *,
    equivalence: Literal["math", "words"] = "math",
    empty: float | None = 0.0,
    all_distinct: Literal["zero", "keep"] = "zero",
    min_share: float = 0.0,
    copies: Literal["keep", "zero"] = "keep",
    entropy_low: float | None = None,
    entropy_high: float | None = None,
    seconds: float = 1.0,
) -> list[Score]:
    """EMPO: the share of the prompt's completions whose answer means the same as this one's,
    arXiv:2504.05812.

    Answers are clustered greedily: each joins the first cluster whose first member it is equivalent to.
    equivalence "math": equal texts, or mathematically equal (``seconds`` limits one comparison, beyond which
    the answers differ); "words": equal except for case, articles and punctuation (the paper's free-text runs
    ask a model: ``empo_model``). A completion without an answer is a cluster of its own, which earns
    ``empty``, or, with null, its share 1/G. All completions get 0 if the answers decide nothing: if none
    agree (all_distinct "zero"), if the largest cluster's share is below ``min_share`` (and there are
    several), or if the entropy of the clusters in nats is not strictly between entropy_low and
    entropy_high (the paper filters such prompts; it prints no numbers). With copies "zero", an answer
    that occurs in the prompt gets 0 too. The released forms: for maths, the defaults; for free text,
    empty -0.5, min_share 0.2, all_distinct keep, copies zero; verl, empty null and all_distinct keep.

    parts: share, clusters, semantic_entropy (nats). ``answer`` is the cluster's first member. The reward
    confirms itself: add a function with labels (weight 0) and check that the answers whose shares rise are
    right.
    """
    answers = [answer_text.extract_answer(completion) for completion in inputs.completions]
    if equivalence == "words":
        clusters = cluster(answers, first_equal(same_words))
    else:
        clusters = cluster(
            answers,
            first_equal(lambda first, second: math_answer.are_equivalent(first, second, seconds)),
        )
    rules = Rules(empty, all_distinct, min_share, copies, entropy_low, entropy_high)
    return score_clusters(inputs, answers, clusters, rules)


def warm_up() -> None:
    math_answer.warm_up()


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
