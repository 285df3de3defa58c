"""Groups of completions as a few arrays, for their way to another process: a step's tokens as one array in
place of millions of Python numbers. What comes out equals what went in, to the bit. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from rltrain.reward.score import Episode, Score
from rltrain.types.samples import Completion, Finish, Prompt, ScoredGroup, Span, TokenSets

__all__ = ["PackedGroups", "pack_groups", "unpack_groups"]

_FINISHES: tuple[Finish, ...] = ("stop", "length", "aborted")


@dataclass(frozen=True)
class PackedGroups:
    """Flat arrays over all completions, group by group, and what has no fixed size as lists.

    counts: (3, C) tokens, version spans and turns of each completion. groups: (2, K) id and completions of
    each group. prompts: by the id of a prompt, or the prompt itself where the receiver does not know it.
    """

    tokens: Any  # (T,) int32
    logprobs: Any  # (T,) float64
    counts: Any
    spans: Any  # (S, 3) int64
    turns: Any  # (U, 2) int64
    finishes: Any  # (C,) int8
    sources: Any  # (C,) int8
    text: bytes
    text_bytes: Any  # (C,) int64
    groups: Any
    prompts: list[str | Prompt]
    episodes: dict[int, Episode]
    kept: dict[int, TokenSets]  # whose tokens were drawn from a part of the vocabulary
    scores: list[Score]
    workers: list[str]  # which sampled each completion


def pack_groups(groups: Sequence[ScoredGroup], known: Mapping[str, Prompt]) -> PackedGroups:
    """known: the prompts that the receiver has, by id."""
    completions = [completion for group in groups for completion in group.completions]
    texts = [completion.text.encode("utf-8", "surrogatepass") for completion in completions]
    counts = [[len(c.token_ids), len(c.versions), len(c.turns)] for c in completions]
    spans = [[span.start, span.stop, span.version] for c in completions for span in c.versions]
    prompts = [group.prompt for group in groups]
    return PackedGroups(
        tokens=_join([c.token_ids for c in completions], np.int32),
        logprobs=_join([c.logprobs for c in completions], np.float64),
        counts=np.array(counts, np.int64).reshape(-1, 3).T,
        spans=np.array(spans, np.int64).reshape(-1, 3),
        turns=np.array([turn for c in completions for turn in c.turns], np.int64).reshape(-1, 2),
        finishes=np.array([_FINISHES.index(c.finish) for c in completions], np.int8),
        sources=np.array([c.source for c in completions], np.int8),
        text=b"".join(texts),
        text_bytes=np.array([len(text) for text in texts], np.int64),
        groups=np.array([[g.group, len(g.completions)] for g in groups], np.int64).reshape(-1, 2).T,
        prompts=[p.id if known.get(p.id) == p else p for p in prompts],
        episodes={place: c.episode for place, c in enumerate(completions) if c.episode is not None},
        kept={place: c.kept for place, c in enumerate(completions) if c.kept is not None},
        scores=[score for group in groups for score in group.scores],
        workers=[completion.worker for completion in completions],
    )


def unpack_groups(packed: PackedGroups, known: Mapping[str, Prompt]) -> list[ScoredGroup]:
    completions = _unpack_completions(packed)
    ids, sizes = packed.groups.tolist()
    groups: list[ScoredGroup] = []
    for id, prompt, (start, stop) in zip(ids, packed.prompts, _cuts(sizes), strict=True):
        asked = known[prompt] if isinstance(prompt, str) else prompt
        scores = tuple(packed.scores[start:stop])
        groups.append(ScoredGroup(id, asked, tuple(completions[start:stop]), scores))
    return groups


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
    return np.fromiter((value for row in rows for value in row), dtype, sum(map(len, rows)))


def _cuts(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """[start, stop) of consecutive parts of these sizes."""
    stops = list(accumulate(sizes))
    return list(zip([0, *stops[:-1]], stops, strict=True)) if stops else []
