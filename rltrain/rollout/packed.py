"""Groups of completions, and requests for them, as a few arrays for their way to another process: a step's
tokens as one array in place of millions of Python numbers. What comes out equals what went in, to the bit.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np

from rltrain.reward.score import Episode, Score
from rltrain.types.samples import (
    Completion,
    Finish,
    Prompt,
    Request,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Span,
    TokenSets,
)

__all__ = [
    "PackedGroups",
    "PackedRequests",
    "pack_groups",
    "pack_requests",
    "unpack_groups",
    "unpack_requests",
    "unpack_sampled",
]

_FINISHES: tuple[Finish, ...] = ("stop", "length", "aborted")


@dataclass(frozen=True)
class PackedPrompts:
    """prompts: the id of one that the receiver knows, or the prompt without its tokens."""

    prompts: list[str | Prompt]
    tokens: Any  # (P,) int32, of those the receiver does not know
    counts: Any  # (N,) int64 tokens of each, 0 where the receiver knows it


@dataclass(frozen=True)
class PackedRequests:
    """samplings: those that differ. parts: (3, R) place in ``samplings``, first sample and count of each."""

    prompts: PackedPrompts
    samplings: list[Sampling]
    parts: Any


@dataclass(frozen=True)
class PackedGroups:
    """Flat arrays over all completions, group by group, and what has no fixed size as lists.

    counts: (3, C) tokens, version spans and turns of each completion. groups: (2, K) id and completions of
    each group. scores: none where the groups are not graded.
    """

    tokens: Any  # (T,) int32
    logprobs: Any  # (T,) float32 where it has all of them, else float64
    counts: Any
    spans: Any  # (S, 3) int64
    turns: Any  # (U, 2) int64
    finishes: Any  # (C,) int8
    sources: Any  # (C,) int8
    text: bytes
    text_bytes: Any  # (C,) int64
    groups: Any
    prompts: PackedPrompts
    episodes: dict[int, Episode]
    kept: dict[int, TokenSets]  # whose tokens were drawn from a part of the vocabulary
    scores: list[Score]
    workers: list[str]  # which sampled each completion


def pack_requests(requests: Sequence[Request]) -> PackedRequests:
    """For a receiver that has no prompts."""
    places: dict[Sampling, int] = {}
    parts = [(places.setdefault(r.sampling, len(places)), r.first, r.count) for r in requests]
    return PackedRequests(
        prompts=_pack_prompts([request.prompt for request in requests], {}),
        samplings=list(places),
        parts=np.array(parts, np.int64).reshape(-1, 3).T,
    )


def unpack_requests(packed: PackedRequests) -> list[Request]:
    parts = zip(_unpack_prompts(packed.prompts, {}), *packed.parts.tolist(), strict=True)
    return [
        Request(prompt, packed.samplings[sampling], first, count) for prompt, sampling, first, count in parts
    ]


def pack_groups(
    groups: Sequence[ScoredGroup] | Sequence[RolloutGroup], known: Mapping[str, Prompt]
) -> PackedGroups:
    """known: the prompts that the receiver has, by id."""
    completions = [completion for group in groups for completion in group.completions]
    texts = [completion.text.encode("utf-8", "surrogatepass") for completion in completions]
    counts = [[len(c.token_ids), len(c.versions), len(c.turns)] for c in completions]
    spans = [[span.start, span.stop, span.version] for c in completions for span in c.versions]
    return PackedGroups(
        tokens=_join([c.token_ids for c in completions], np.int32),
        logprobs=_halve(_join([c.logprobs for c in completions], np.float64)),
        counts=np.array(counts, np.int64).reshape(-1, 3).T,
        spans=np.array(spans, np.int64).reshape(-1, 3),
        turns=np.array([turn for c in completions for turn in c.turns], np.int64).reshape(-1, 2),
        finishes=np.array([_FINISHES.index(c.finish) for c in completions], np.int8),
        sources=np.array([c.source for c in completions], np.int8),
        text=b"".join(texts),
        text_bytes=np.array([len(text) for text in texts], np.int64),
        groups=np.array([[g.group, len(g.completions)] for g in groups], np.int64).reshape(-1, 2).T,
        prompts=_pack_prompts([group.prompt for group in groups], known),
        episodes={place: c.episode for place, c in enumerate(completions) if c.episode is not None},
        kept={place: c.kept for place, c in enumerate(completions) if c.kept is not None},
        scores=[score for group in groups if isinstance(group, ScoredGroup) for score in group.scores],
        workers=[completion.worker for completion in completions],
    )


def unpack_groups(packed: PackedGroups, known: Mapping[str, Prompt]) -> list[ScoredGroup]:
    """The graded groups that were packed."""
    scores = iter(packed.scores)
    return [
        ScoredGroup(
            group.group, group.prompt, group.completions, tuple(islice(scores, len(group.completions)))
        )
        for group in unpack_sampled(packed, known)
    ]


def unpack_sampled(packed: PackedGroups, known: Mapping[str, Prompt]) -> list[RolloutGroup]:
    """The groups that were packed, without their scores."""
    completions = iter(_unpack_completions(packed))
    ids, sizes = packed.groups.tolist()
    parts = zip(ids, _unpack_prompts(packed.prompts, known), sizes, strict=True)
    return [RolloutGroup(id, prompt, tuple(islice(completions, size))) for id, prompt, size in parts]


def _pack_prompts(prompts: Sequence[Prompt], known: Mapping[str, Prompt]) -> PackedPrompts:
    are_known = [known.get(prompt.id) == prompt for prompt in prompts]
    sent = [() if is_known else p.token_ids for p, is_known in zip(prompts, are_known, strict=True)]
    return PackedPrompts(
        prompts=[
            p.id if is_known else replace(p, token_ids=())
            for p, is_known in zip(prompts, are_known, strict=True)
        ],
        tokens=_join(sent, np.int32),
        counts=np.array([len(tokens) for tokens in sent], np.int64),
    )


def _unpack_prompts(packed: PackedPrompts, known: Mapping[str, Prompt]) -> list[Prompt]:
    tokens = packed.tokens.tolist()
    return [
        known[prompt] if isinstance(prompt, str) else replace(prompt, token_ids=tuple(tokens[slice(*part)]))
        for prompt, part in zip(packed.prompts, _cuts(packed.counts.tolist()), strict=True)
    ]


def _unpack_completions(packed: PackedGroups) -> list[Completion]:
    tokens = packed.tokens.tolist()
    logprobs = packed.logprobs.tolist()
    spans = [Span(*span) for span in packed.spans.tolist()]
    turns = [(start, stop) for start, stop in packed.turns.tolist()]
    lengths, span_counts, turn_counts = packed.counts.tolist()
    completions: list[Completion] = []
    parts = zip(
        _cuts(lengths),
        _cuts(span_counts),
        _cuts(turn_counts),
        _cuts(packed.text_bytes.tolist()),
        packed.finishes.tolist(),
        packed.sources.tolist(),
        strict=True,
    )
    for place, (token, span, turn, text, finish, source) in enumerate(parts):
        completions.append(
            Completion(
                token_ids=tuple(tokens[slice(*token)]),
                logprobs=tuple(logprobs[slice(*token)]),
                finish=_FINISHES[finish],
                text=packed.text[slice(*text)].decode("utf-8", "surrogatepass"),
                versions=tuple(spans[slice(*span)]),
                source=source,
                turns=tuple(turns[slice(*turn)]),
                episode=packed.episodes.get(place),
                kept=packed.kept.get(place),
                worker=packed.workers[place],
            )
        )
    return completions


def _join(rows: Sequence[Sequence[float]], dtype: Any) -> Any:
    return np.fromiter(chain.from_iterable(rows), dtype, sum(map(len, rows)))


def _halve(values: Any) -> Any:
    """float64 ``values`` in float32 where that has every one of them, as it has those of most engines."""
    with np.errstate(over="ignore"):
        halved = values.astype(np.float32)
    is_same = (halved == values) | (np.isnan(halved) & np.isnan(values))
    return halved if is_same.all() else values


def _cuts(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """[start, stop) of consecutive parts of these sizes."""
    stops = list(accumulate(sizes))
    return list(zip([0, *stops[:-1]], stops, strict=True)) if stops else []
