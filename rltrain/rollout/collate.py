"""Turns scored groups into the tensors of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.rollout.steps import StepSplitter, step_ids
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import SOURCE_REFERENCE, Completion, ScoredGroup


def collate(groups: Sequence[ScoredGroup], lines: StepSplitter | None = None) -> tuple[TokenRows, TrainBatch]:
    """One row per completion, in group order, padded on the right to the longest completion.

    A completion that no grader could grade, or that the engine aborted, is masked out entirely: its reward is
    NaN, which group statistics leave out. A completion of the reference model is masked out as well, but
    keeps its reward. Advantages start at 0 and weights at 1. Answers get ids within their group, across all
    sources. lines: divides completions without turns into steps (``step_ids``). Raises ValueError on an empty
    step.
    """
    pairs = [
        (group, completion, score)
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]
    if not pairs:
        raise ValueError("a step arrived without a single completion; the engine returned no groups")
    completions = [completion for _, completion, _ in pairs]
    width = max(len(completion.token_ids) for completion in completions)

    is_usable = [score.ungraded is None and completion.finish != "aborted" for _, completion, score in pairs]
    is_trained = [
        usable and completion.source != SOURCE_REFERENCE
        for completion, usable in zip(completions, is_usable, strict=True)
    ]
    mask = _policy_tokens(completions, width) & torch.tensor(is_trained)[:, None]

    rollout_logp = torch.zeros(len(pairs), width)
    has_logp = _first_columns([len(completion.logprobs) for completion in completions], width)
    rollout_logp[has_logp] = torch.tensor(
        [logp for completion in completions for logp in completion.logprobs]
    )

    verdicts = [None if score.ungraded is not None else score.correct for _, _, score in pairs]
    rewards = [
        score.value if usable else math.nan for (_, _, score), usable in zip(pairs, is_usable, strict=True)
    ]
    answers = [number for group in groups for number in answer_ids(group)]

    batch = TrainBatch(
        mask=mask,
        advantages=torch.zeros(len(pairs), width),
        weights=torch.ones(len(pairs), width),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group=torch.tensor([group.group for group, _, _ in pairs]),
        source=torch.tensor([completion.source for _, completion, _ in pairs]),
        version=_token_versions(completions, width),
        sample=torch.tensor([index for group in groups for index in range(len(group.completions))]),
        rollout_logp=rollout_logp,
        correct=torch.tensor([math.nan if verdict is None else float(verdict) for verdict in verdicts]),
        answer=torch.tensor(answers),
        step_id=step_ids(completions, mask, lines),
    )
    is_truncated = any(completion.kept is not None for completion in completions)
    rows = TokenRows(
        prompts=tuple(group.prompt.token_ids for group, _, _ in pairs),
        completions=tuple(completion.token_ids for completion in completions),
        kept=tuple(completion.kept for completion in completions) if is_truncated else None,
    )
    return rows, batch


def answer_ids(group: ScoredGroup) -> list[int]:
    """A number for each completion, equal for equal answers, from 0 in order of appearance; -1 where no
    grader extracted an answer.
    """
    known: dict[str, int] = {}
    return [
        -1 if score.answer is None else known.setdefault(score.answer, len(known)) for score in group.scores
    ]


def _policy_tokens(completions: Sequence[Completion], width: int) -> Tensor:
    """(B, width) bool, true on the tokens that the policy wrote, which follow from lengths and turn spans,
    never from token ids.
    """
    lengths = [0 if completion.turns else len(completion.token_ids) for completion in completions]
    mask = _first_columns(lengths, width)
    for row, completion in enumerate(completions):
        for start, stop in completion.turns or ():
            mask[row, start:stop] = True
    return mask


def _token_versions(completions: Sequence[Completion], width: int) -> Tensor:
    """(B, width) int64: the version that sampled each token; a row's last one again beyond its end."""
    versions = torch.empty(len(completions), width, dtype=torch.int64)
    for row, completion in enumerate(completions):
        for span in completion.versions:
            versions[row, span.start :] = span.version
    return versions


def _first_columns(lengths: Sequence[int], width: int) -> Tensor:
    """(B, width) bool, true on the first ``lengths[b]`` columns of row b."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]
