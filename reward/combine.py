"""Combines several functions' scores for one completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rltrain.reward.score import Score, is_float32


def combine(labels: Sequence[str], weights: Sequence[float], scores: Sequence[Score]) -> Score:
    """The weighted sum, value = sum of w_i v_i, of one completion's scores by several functions.

    parts: each function's value under its label, its own parts as label/part, and ``correct`` (raw
    correctness, which dynamic sampling reads). ``correct`` and the answer come from the first function that
    gives one. The result is ungraded if any function left the completion ungraded; with several functions the
    reason names the function, as in "math_answer/timeout". A sum that float32 cannot hold is ungraded "nan".
    """
    for label, score in zip(labels, scores, strict=True):
        if score.ungraded is not None:
            return Score(0.0, ungraded=score.ungraded if len(scores) == 1 else f"{label}/{score.ungraded}")
    parts: dict[str, float] = {}
    for label, score in zip(labels, scores, strict=True):
        parts[label] = score.value
        parts |= {f"{label}/{name}": part for name, part in score.parts.items()}
    verdicts = [score.parts["correct"] for score in scores if "correct" in score.parts]
    parts |= {"correct": verdicts[0]} if verdicts else {}
    answer = next((score.answer for score in scores if score.answer is not None), None)
    total = sum(weight * score.value for weight, score in zip(weights, scores, strict=True))
    if not is_float32(total):
        return Score(0.0, ungraded="nan", why=f"the weighted sum of {', '.join(labels)} is {total}")
    return Score(total, parts, answer=answer, extra=_merge_extras([score.extra for score in scores], labels))


def _merge_extras(texts: Sequence[Mapping[str, str]], labels: Sequence[str]) -> dict[str, str]:
    """Texts by column, prefixed with the function's label if there are several functions."""
    if len(texts) == 1:
        return dict(texts[0])
    return {
        f"{label}/{name}": text
        for label, extra in zip(labels, texts, strict=True)
        for name, text in extra.items()
    }


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """Labels made unique: a second ``format`` becomes ``format#2``."""
    return [
        label if labels[:i].count(label) == 0 else f"{label}#{labels[:i].count(label) + 1}"
        for i, label in enumerate(labels)
    ]
