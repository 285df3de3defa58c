"""A reward without labels: the share of the prompt's completions with the same meaning."""

from __future__ import annotations

from typing import Literal

from rltrain.reward import answer_text, math_answer
from rltrain.reward.answer_clusters import Rules, cluster, first_equal, same_words, score_clusters
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
