"""A reward without labels: the share of the prompt's completions with the same meaning."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Literal

from rltrain.reward import answer_text, answer_words, math_answer
from rltrain.reward.score import RewardInputs, Score, reward


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
    ask a 1.5B model). A completion without an answer is a cluster of its own, which earns ``empty``, or, with
    null, its share 1/G. All completions get 0 if the answers decide nothing: if none agree (all_distinct
    "zero"), if the largest cluster's share is below ``min_share`` (and there are several), or if the entropy
    of the clusters in nats is not strictly between entropy_low and entropy_high (the paper filters such
    prompts; it prints no numbers). With copies "zero", an answer that occurs in the prompt gets 0 too. The
    released forms: for maths, the defaults; for free text, empty -0.5, min_share 0.2, all_distinct keep,
    copies zero; verl, empty null and all_distinct keep.

    parts: share, clusters, semantic_entropy (nats). ``answer`` is the cluster's first member. The reward
    confirms itself: add a function with labels (weight 0) and check that the answers whose shares rise are
    right.
    """
    answers = [answer_text.extract_answer(completion) for completion in inputs.completions]
    if equivalence == "words":
        clusters = cluster(answers, same_words)
    else:
        clusters = cluster(answers, lambda first, second: math_answer.are_equivalent(first, second, seconds))
    sizes = collections.Counter(clusters)
    shares = [sizes[number] / len(answers) for number in clusters]
    entropy = sum(-size / len(answers) * math.log(size / len(answers)) for size in sizes.values()) + 0.0
    is_undecided = (
        (all_distinct == "zero" and len(sizes) == len(answers) > 1)
        or (max(shares) < min_share and len(sizes) > 1)
        or (entropy_low is not None and entropy <= entropy_low)
        or (entropy_high is not None and entropy >= entropy_high)
    )
    parts = {"clusters": float(len(sizes)), "semantic_entropy": entropy}
    scores: list[Score] = []
    for answer, number, share in zip(answers, clusters, shares, strict=True):
        if answer is None and empty is not None:
            value = 0.0 if is_undecided and empty > 0 else empty
        elif is_undecided or (
            answer is not None and copies == "zero" and answer.casefold() in inputs.prompt.casefold()
        ):
            value = 0.0
        else:
            value = share
        scores.append(Score(value, {"share": share, **parts}, answer=answers[number]))
    return scores


def warm_up() -> None:
    math_answer.warm_up()


def cluster(answers: Sequence[str | None], are_equal: Callable[[str, str], bool]) -> list[int]:
    """The cluster of each answer, named by the position of its first member.

    Equal texts need no call of ``are_equal``; None forms a cluster alone.
    """
    representatives: dict[str, int] = {}  # text of each cluster's first member -> its position
    cluster_of_text: dict[str, int] = {}
    clusters: list[int] = []
    for position, answer in enumerate(answers):
        if answer is None:
            clusters.append(position)
            continue
        if answer not in cluster_of_text:
            cluster_of_text[answer] = next(
                (number for member, number in representatives.items() if are_equal(member, answer)), position
            )
            if cluster_of_text[answer] == position:
                representatives[answer] = position
        clusters.append(cluster_of_text[answer])
    return clusters


def same_words(first: str, second: str) -> bool:
    return answer_words.normalize_words(first) == answer_words.normalize_words(second) != ""
