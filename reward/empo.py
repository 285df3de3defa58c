"""A reward without labels: how many of the prompt's completions mean the same."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Literal

from reward import answer_text, answer_words, math_answer
from reward.score import RewardInputs, Score, reward


@reward("empo", scope="group")
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
    equivalence "math": equal texts, or mathematically equal (``seconds`` limits one comparison; then they
    differ); "words": equal but for case, articles and punctuation (the paper's free-text runs ask a 1.5B
    model). A completion without an answer is a cluster of its own, which earns ``empty``, or, with null, its
    share 1/G. Where the answers decide nothing all get 0: if none agree (all_distinct "zero"), if the largest
    cluster's share is below ``min_share`` (and there are several), or if the entropy of the clusters in nats
    is not strictly between entropy_low and entropy_high (the paper filters such prompts; it prints no
    numbers). copies "zero": so does an answer that stands in the prompt. The released forms: maths as the
    defaults; free text empty -0.5, min_share 0.2, all_distinct keep, copies zero; verl empty null,
    all_distinct keep.

    parts: share, clusters, semantic_entropy (nats). ``answer`` is the cluster's first member. The reward
    confirms itself: have a function with labels beside it (weight 0) and watch whether the shares it raises
    are right.
    """
    answers = [answer_text.extracted(completion) for completion in inputs.completions]
    clusters = cluster(
        answers,
        same_words
        if equivalence == "words"
        else lambda one, other: math_answer.equivalent(one, other, seconds),
    )
    sizes = collections.Counter(clusters)
    shares = [sizes[number] / len(answers) for number in clusters]
    entropy = sum(-size / len(answers) * math.log(size / len(answers)) for size in sizes.values()) + 0.0
    undecided = (
        (all_distinct == "zero" and len(sizes) == len(answers) > 1)
        or (max(shares) < min_share and len(sizes) > 1)
        or (entropy_low is not None and entropy <= entropy_low)
        or (entropy_high is not None and entropy >= entropy_high)
    )
    parts = {"clusters": float(len(sizes)), "semantic_entropy": entropy}
    scores: list[Score] = []
    for answer, number, share in zip(answers, clusters, shares, strict=True):
        if answer is None and empty is not None:
            value = 0.0 if undecided and empty > 0 else empty
        elif undecided or (
            answer is not None and copies == "zero" and answer.casefold() in inputs.prompt.casefold()
        ):
            value = 0.0
        else:
            value = share
        scores.append(Score(value, {"share": share, **parts}, answer=answers[number]))
    return scores


def warm_up() -> None:
    math_answer.warm_up()


def cluster(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """Each answer's cluster, named by the position of its first member.

    Equal texts are the same without asking; None is alone.
    """
    representatives: dict[str, int] = {}  # text of each cluster's first member -> its position
    known: dict[str, int] = {}
    found: list[int] = []
    for position, answer in enumerate(answers):
        if answer is None:
            found.append(position)
            continue
        if answer not in known:
            known[answer] = next(
                (number for first, number in representatives.items() if same(first, answer)), position
            )
            if known[answer] == position:
                representatives[answer] = position
        found.append(known[answer])
    return found


def same_words(one: str, other: str) -> bool:
    return answer_words.words(one) == answer_words.words(other) != ""
