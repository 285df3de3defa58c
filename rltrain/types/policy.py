"""Tensors of a step that learns from the policy's own samples, and the results of its losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltrain.types.samples import TokenSets


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids of the B rows of a step, ragged; row i belongs to row i of the step's TrainBatch."""

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    # by completion token, whether a judged example's log-prob counts it; None: all count. Rollouts say it in
    # the mask of their TrainBatch
    scored: tuple[tuple[bool, ...], ...] | None = None
    # by row, the tokens that each of its tokens was drawn from; None: from the whole vocabulary
    kept: tuple[TokenSets | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.completions)} completions")
        if self.scored is not None and [*map(len, self.scored)] != [*map(len, self.completions)]:
            raise ValueError(
                f"scored tokens are {[*map(len, self.scored)]}, completion tokens "
                f"{[*map(len, self.completions)]}; every completion token is one or the other"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> TokenRows:
        """The rows at the positions ``index`` (int64), in that order."""
        positions = index.tolist()
        return TokenRows(
            tuple(self.prompts[row] for row in positions),
            tuple(self.completions[row] for row in positions),
            None if self.scored is None else tuple(self.scored[row] for row in positions),
            None if self.kept is None else tuple(self.kept[row] for row in positions),
        )


_PER_TOKEN = (
    *("advantages", "weights", "old_logp", "rollout_logp", "logp_now", "old_entropy", "entropy_now"),
    *("ref_logp", "teacher_logp", "process_reward", "step_id", "touched", "version"),
)
_PER_ROW = ("rewards", "group", "source", "sample", "correct", "answer")


@dataclass(frozen=True)
class TrainBatch:
    """The small tensors of one optimizer step (or of some of its rows), all detached.

    A field is ``None`` if no function of the recipe needs it: the learner computes the union of their
    declared needs. ``mask`` may have any dtype and is stored as bool.
    """

    mask: Tensor  # (B, T) bool, True where the policy wrote the token and it counts in the loss
    advantages: Tensor  # (B, T)
    weights: Tensor  # (B, T) factor of the per-token policy loss, 1 at first
    rewards: Tensor  # (B,)
    group: Tensor  # (B,) int64, id of the prompt group
    source: Tensor  # (B,) int64
    # (B, T) int64, version of the policy that sampled each token; columns beyond a row repeat its last one.
    # (B,) stands for rows of which all tokens are of one version
    version: Tensor
    # (B,) int64, number of the completion in its group, from 0; together with the group it identifies the row
    sample: Tensor | None = None
    rollout_logp: Tensor | None = None  # (B, T) nats, reported by the engine
    old_logp: Tensor | None = None  # (B, T) nats, learner's, before the first update of the step
    logp_now: Tensor | None = None  # (B, T) nats, learner's, at the start of the current optimizer batch
    old_entropy: Tensor | None = None  # (B, T) nats
    ref_logp: Tensor | None = None  # (B, T) nats, frozen reference
    teacher_logp: Tensor | None = None  # (B, T) nats
    # (B, T) nats, log-ratio of a process reward model and its reference (PRIME)
    process_reward: Tensor | None = None
    entropy_now: Tensor | None = None  # (B, T) nats, learner's, at the start of the current optimizer batch
    # (B, T) int64, the token's turn or reasoning step, from 0 in each row; -1 outside the mask
    step_id: Tensor | None = None
    # (B,) 1 right, 0 wrong, NaN if no reward function reports it; before any penalty
    correct: Tensor | None = None
    # (B,) int64, equal for equal extracted answers of one group, -1 without an answer
    answer: Tensor | None = None
    touched: Tensor | None = None  # (B, T) bool, tokens that a control changed; None: no control ran
    # (B, T) each: tensors that a control passes to the loss of its method
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    # numbers that a control logs, as ``control/<key>``
    notes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self.mask.bool())
        rows = self.mask.shape[0]
        shape = self.mask.shape
        if self.version.shape == (rows,):
            object.__setattr__(self, "version", self.version[:, None].expand(shape))
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"TrainBatch.{name} has shape {tuple(value.shape)}, the mask {tuple(shape)}")
        for name, value in self.extra.items():
            if value.shape != shape:
                raise ValueError(
                    f"TrainBatch.extra[{name!r}] has shape {tuple(value.shape)}, the mask {tuple(shape)}"
                )
        for name in _PER_ROW:
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise ValueError(f"TrainBatch.{name} has shape {tuple(value.shape)}, expected ({rows},)")

    @property
    def oldest(self) -> Tensor:
        """(B,) int64, the oldest version that sampled any token of a row."""
        return self.version.min(dim=1).values

    @property
    def totals_of_mask(self) -> tuple[int, int]:
        """Numbers of masked-in tokens and of sequences with at least one of them."""
        per_row = self.mask.sum(dim=1)
        return int(per_row.sum()), int((per_row > 0).sum())

    def replace(self, **changes: Any) -> TrainBatch:
        return dataclasses.replace(self, **changes)

    def with_extra(self, **tensors: Tensor) -> TrainBatch:
        """Adds to ``extra`` (B, T) tensors from a control for the loss of its method."""
        return dataclasses.replace(self, extra={**self.extra, **tensors})

    def with_metrics(self, **numbers: float) -> TrainBatch:
        """Adds to ``notes`` numbers that are logged as ``control/<key>``."""
        return dataclasses.replace(self, notes={**self.notes, **numbers})

    def rows(self, index: Tensor | Sequence[int], width: int | None = None) -> TrainBatch:
        """The rows at the positions ``index`` (int64), cut to the first ``width`` token columns."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.mask.device)
        per_token = {
            name: value[index][:, :width]
            for name in ("mask", *_PER_TOKEN)
            if (value := getattr(self, name)) is not None
        }
        per_row = {name: value[index] for name in _PER_ROW if (value := getattr(self, name)) is not None}
        extra = {name: value[index][:, :width] for name, value in self.extra.items()}
        return dataclasses.replace(self, **per_token, **per_row, extra=extra)

    def to(self, device: torch.device | str) -> TrainBatch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return dataclasses.replace(self, **tensors, extra=extra)


@dataclass(frozen=True)
class PolicyTokens:
    """The current policy's statistics: the only tensors with a gradient.

    A statistic that no function needs is absent.
    """

    logp: Tensor  # (B, T) nats, at the sampling temperature
    entropy: Tensor | None = None  # (B, T) nats
    # (B, T) each, by its name in a function's ``needs``
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTotals:
    """Counts over one optimizer update (all ranks, all micro-batches): the source of every denominator."""

    tokens: int  # masked-in tokens
    sequences: int  # rows with at least one masked-in token
    max_tokens: int  # the constant L_max: rollout.max_tokens, never the padded width


@dataclass(frozen=True)
class TokenLoss:
    """Unreduced loss, (B, T) per token or (B, 1) per sequence, and metrics to be averaged over the masked-in
    tokens.
    """

    values: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each (B, T) or (B, 1), detached
