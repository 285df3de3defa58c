"""Several functions' scores of one completion into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reward.score import Score, is_float32


def combine(labels: Sequence[str], weights: Sequence[float], scores: Sequence[Score]) -> Score:
    """The weighted sum, value = sum of w_i v_i, of one completion's scores by several functions.

    parts: each function's value by its label, its own parts as label/part, and ``correct`` (raw correctness,
    which dynamic sampling reads) from the first function that gives one, as is the answer. Ungraded where any
    function left it ungraded; among several functions the reason names the function, as in
    "math_answer/timeout". A sum that float32 cannot hold is ungraded "nan".
    """
    for label, score in zip(labels, scores, strict=True):
        if score.ungraded is not None:
            return Score(0.0, ungraded=score.ungraded if len(scores) == 1 else f"{label}/{score.ungraded}")
    parts: dict[str, float] = {}
    for label, score in zip(labels, scores, strict=True):
        parts[label] = score.value
        parts |= {f"{label}/{name}": part for name, part in score.parts.items()}
    raw = [score.parts["correct"] for score in scores if "correct" in score.parts]
    parts |= {"correct": raw[0]} if raw else {}
    answer = next((score.answer for score in scores if score.answer is not None), None)
    total = sum(weight * score.value for weight, score in zip(weights, scores, strict=True))
    if not is_float32(total):
        return Score(0.0, ungraded="nan", why=f"the weighted sum of {', '.join(labels)} is {total}")
    return Score(total, parts, answer=answer, extra=_merged([score.extra for score in scores], labels))


def _merged(texts: Sequence[Mapping[str, str]], labels: Sequence[str]) -> dict[str, str]:
    """Texts by column, under the function's label where there are several functions."""
    if len(texts) == 1:
        return dict(texts[0])
    return {
        f"{label}/{name}": text
        for label, extra in zip(labels, texts, strict=True)
        for name, text in extra.items()
    }


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """Labels told apart: a second ``format`` is ``format#2``."""
    return [
        label if labels[:i].count(label) == 0 else f"{label}#{labels[:i].count(label) + 1}"
        for i, label in enumerate(labels)
    ]
