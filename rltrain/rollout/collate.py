"""Scored groups to the tensors of one step."""

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

    A completion that nobody could grade, or that the engine gave up on, is masked out whole: its reward is
    NaN, which group statistics leave out. The reference model's is masked out as well, but keeps its reward.
    Advantages start at 0 and weights at 1. Answers get ids within their group, of all sources together. lines:
    cuts completions without turns into steps (``step_ids``). Raises ValueError on an empty step.
    """
    pairs = [
        (group, completion, score)
        for group in groups
        for completion, score in zip(group.completions, group.scores, strict=True)
    ]
    if not pairs:
        raise ValueError("a step arrived without a single completion; the engine returned no groups")
    width = max(len(completion.token_ids) for _, completion, _ in pairs)
    trained = [score.ungraded is None and completion.finish != "aborted" for _, completion, score in pairs]
    counting = [
        kept and completion.source != SOURCE_REFERENCE
        for (_, completion, _), kept in zip(pairs, trained, strict=True)
    ]
    completions = [completion for _, completion, _ in pairs]
    mask = _written(completions, width) & torch.tensor(counting)[:, None]
    rollout_logp = torch.zeros(len(pairs), width)
    has_logp = _ahead_of([len(completion.logprobs) for completion in completions], width)
    rollout_logp[has_logp] = torch.tensor(
        [logp for completion in completions for logp in completion.logprobs]
    )
    verdicts = [None if score.ungraded is not None else score.correct for _, _, score in pairs]
    rewards = [score.value if kept else math.nan for (_, _, score), kept in zip(pairs, trained, strict=True)]
    answers = [number for group in groups for number in answer_ids(group)]
    batch = TrainBatch(
        mask=mask,
        advantages=torch.zeros(len(pairs), width),
        weights=torch.ones(len(pairs), width),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group=torch.tensor([group.group for group, _, _ in pairs]),
        source=torch.tensor([completion.source for _, completion, _ in pairs]),
        version=torch.tensor([completion.oldest_version for _, completion, _ in pairs]),
        sample=torch.tensor([index for group in groups for index in range(len(group.completions))]),
        rollout_logp=rollout_logp,
        correct=torch.tensor([math.nan if verdict is None else float(verdict) for verdict in verdicts]),
        answer=torch.tensor(answers),
        step_id=step_ids(completions, mask, lines),
    )
    rows = TokenRows(
        prompts=tuple(group.prompt.token_ids for group, _, _ in pairs),
        completions=tuple(completion.token_ids for completion in completions),
    )
    return rows, batch


def answer_ids(group: ScoredGroup) -> list[int]:
    """A number per completion, equal for equal answers, from 0 in order of appearance; -1 where no
    grader found an answer.
    """
    known: dict[str, int] = {}
    return [
        -1 if score.answer is None else known.setdefault(score.answer, len(known)) for score in group.scores
    ]


def _written(completions: Sequence[Completion], width: int) -> Tensor:
    """(B, width) bool, true on the tokens the policy wrote; lengths and turn spans decide, never
    token ids.
    """
    mask = _ahead_of(
        [0 if completion.turns else len(completion.token_ids) for completion in completions], width
    )
    for row, completion in enumerate(completions):
        for start, stop in completion.turns or ():
            mask[row, start:stop] = True
    return mask


def _ahead_of(lengths: Sequence[int], width: int) -> Tensor:
    """(B, width) bool, true on the first ``lengths`` columns of each row."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]
