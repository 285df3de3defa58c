"""Truncated sampling: how many of the likeliest tokens may be drawn, and what ends a completion early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rltrain.types.samples import Completion, Span, Truncation

__all__ = ["contains_stop", "cut_at_stop", "kept_counts", "kept_tokens", "penalise_repetition_"]

# A character has at most 4 bytes, each of which may be a token; the rest is slack for the first token of a
# window, which some decoders strip of its space.
_TOKENS_PER_CHARACTER = 4
_SLACK_TOKENS = 8


def kept_tokens(logits: Tensor, truncation: Truncation) -> Tensor:
    """(R, V) bool, the tokens that may be drawn from softmax(logits), logits (R, V) float32.

    Of equally likely tokens those with the smaller ids come first. Rows that are not finite keep all tokens,
    so that the engine's own check finds them.
    """
    probabilities, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
    counts = kept_counts(probabilities, truncation)
    is_kept = torch.arange(logits.shape[1], device=logits.device) < counts[:, None]
    is_kept |= ~probabilities.isfinite().all(dim=-1, keepdim=True)
    return torch.zeros_like(is_kept).scatter_(1, order, is_kept)


def kept_counts(probabilities: Tensor, truncation: Truncation) -> Tensor:
    """(R,) int64, at least 1: how many tokens stay of (R, V) probabilities in descending order."""
    counts = torch.full_like(probabilities[:, 0], probabilities.shape[1], dtype=torch.int64)
    if truncation.min_p > 0:
        counts = (probabilities >= truncation.min_p * probabilities[:, :1]).sum(dim=-1)
    if truncation.top_h is not None:
        counts = torch.minimum(counts, _count_within_entropy(probabilities, truncation.top_h, counts))
    if truncation.top_k > 0:
        counts = counts.clamp(max=truncation.top_k)
    if truncation.top_p < 1:
        sums = probabilities.cumsum(dim=-1)
        before = sums - probabilities
        total = sums.gather(1, counts[:, None] - 1)  # of the tokens that are left
        counts = torch.minimum(counts, (before < truncation.top_p * total).sum(dim=-1))
    return counts.clamp(min=1)


def _count_within_entropy(probabilities: Tensor, share: float, counts: Tensor) -> Tensor:
    """(R,) length of the longest prefix before the first one whose entropy, renormalised, is above ``share``
    of the entropy of the first ``counts`` tokens (Top-H, arXiv:2509.02510).

    The authors' code compares sums of -p ln p that are not renormalised.
    """
    mass = probabilities.cumsum(dim=-1)
    surprise = -torch.where(probabilities > 0, probabilities * probabilities.log(), 0.0).cumsum(dim=-1)
    entropy = surprise / mass + mass.log()  # of each prefix, renormalised
    allowed = share * entropy.gather(1, counts[:, None] - 1)
    exceeds = entropy > allowed
    exceeds[:, 0] = False  # one token has no entropy, except for rounding
    return torch.where(exceeds.any(dim=-1), exceeds.int().argmax(dim=-1), probabilities.shape[1])


def penalise_repetition_(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divides the positive logits of the tokens of each row's text by ``penalty`` and multiplies the others,
    in place (arXiv:1909.05858). logits (R, V).
    """
    for row, text in zip(logits, texts, strict=True):
        ids = torch.tensor(sorted(set(text)), device=logits.device)
        values = row[ids]
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def contains_stop(tokens: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether the text of ``tokens`` holds one of ``stop`` in its end, where the last token may have put
    it.
    """
    longest = max(map(len, stop))
    window = decode(tokens[-(_TOKENS_PER_CHARACTER * longest + _SLACK_TOKENS) :])
    return any(text in window for text in stop) and any(text in decode(tokens) for text in stop)


def cut_at_stop(
    completion: Completion, stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> Completion:
    """``completion`` up to the token that completes the first of ``stop`` in its text."""
    if not any(text in completion.text for text in stop):
        return completion
    tokens = completion.token_ids
    low = 1
    high = len(tokens)  # the text of the first ``high`` tokens holds one
    while low < high:
        middle = (low + high) // 2
        text = decode(tokens[:middle])
        if any(part in text for part in stop):
            high = middle
        else:
            low = middle + 1
    return dataclasses.replace(
        completion,
        token_ids=tokens[:high],
        logprobs=completion.logprobs[:high],
        finish="stop",
        text=decode(tokens[:high]),
        versions=_cut_versions(completion.versions, high),
        kept=None if completion.kept is None else completion.kept.first(high),
    )


def _cut_versions(versions: Sequence[Span], end: int) -> tuple[Span, ...]:
    return tuple(dataclasses.replace(span, stop=min(span.stop, end)) for span in versions if span.start < end)
