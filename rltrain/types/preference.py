"""Tensors of a step that learns from judged completions, and the results of its losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

_PER_EXAMPLE = ("length", "ref_logp", "previous_logp", "logp_now")


@dataclass(frozen=True)
class CompletionFacts:
    """Facts about N completions that are known before the gradient pass, all detached.

    A log-prob is a sum over the scored tokens: those of the completion with its final EOS, without prompt and
    template. A field is ``None`` if the loss does not need it.
    """

    length: Tensor  # (N,) scored tokens, at least 1
    ref_logp: Tensor | None = None  # (N,) nats, frozen reference
    previous_logp: Tensor | None = None  # (N,) nats, frozen previous iterate (INPO's pi_t)
    logp_now: Tensor | None = None  # (N,) nats, the learner's, at the start of the current optimizer batch

    def __post_init__(self) -> None:
        _check_examples(self, _PER_EXAMPLE, self.length.shape[0])

    def rows(self, index: Tensor) -> CompletionFacts:
        return _select_rows(self, index, _PER_EXAMPLE)

    def to(self, device: torch.device | str) -> CompletionFacts:
        return _move_to(self, device, _PER_EXAMPLE)


@dataclass(frozen=True)
class PairBatch:
    """N preference pairs of one optimizer update (or some of them), all detached; row i of both sides answers
    the same prompt.

    ``statistics`` are numbers of the whole optimizer batch (all ranks) that the loss needs:
    ``loss/preference/statistics.py`` adds them before the batch is split into micro-batches.
    """

    chosen: CompletionFacts
    rejected: CompletionFacts
    prompt: Tensor  # (N,) int64, equal for pairs of one prompt
    margin: Tensor | None = None  # (N,) score of chosen minus score of rejected, in the data's units
    p_chosen: Tensor | None = None  # (N,) probability that chosen is the better one
    weight: Tensor | None = None  # (N,) factor of an example's loss; None: 1
    # (N,) each: numeric columns of the data that a loss needs
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    # () or (N,) each, over the whole optimizer batch
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_examples(self, ("prompt", "margin", "p_chosen", "weight"), len(self))
        if self.rejected.length.shape[0] != len(self):
            raise ValueError(f"{len(self)} chosen completions but {self.rejected.length.shape[0]} rejected")

    def __len__(self) -> int:
        return self.chosen.length.shape[0]

    def rows(self, index: Tensor | Sequence[int]) -> PairBatch:
        """The pairs at the positions ``index``; scalar statistics do not change."""
        return _select_rows(self, torch.as_tensor(index, dtype=torch.int64), _PER_PAIR)

    def to(self, device: torch.device | str) -> PairBatch:
        return _move_to(self, device, _PER_PAIR)

    def with_statistics(self, **values: Tensor) -> PairBatch:
        return dataclasses.replace(self, statistics={**self.statistics, **values})


@dataclass(frozen=True)
class LabelBatch:
    """N completions of one optimizer update (or some of them), each judged by itself, all detached.

    See PairBatch.
    """

    completion: CompletionFacts
    prompt: Tensor  # (N,) int64, equal for completions of one prompt
    # (N,) float, 1 desirable or correct, 0 not; some losses allow soft labels in between
    label: Tensor | None = None
    # prompt i with another prompt's completion, for KTO's estimate of the KL
    mismatched: CompletionFacts | None = None
    weight: Tensor | None = None  # (N,) factor of an example's loss; None: 1
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each
    # () or (N,) each, over the whole optimizer batch
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_examples(self, ("prompt", "label", "weight"), len(self))
        if self.mismatched is not None and self.mismatched.length.shape[0] != len(self):
            raise ValueError(f"{len(self)} completions but {self.mismatched.length.shape[0]} mismatched ones")

    def __len__(self) -> int:
        return self.completion.length.shape[0]

    def rows(self, index: Tensor | Sequence[int]) -> LabelBatch:
        """The completions at the positions ``index``; scalar statistics do not change."""
        return _select_rows(self, torch.as_tensor(index, dtype=torch.int64), _PER_LABEL)

    def to(self, device: torch.device | str) -> LabelBatch:
        return _move_to(self, device, _PER_LABEL)

    def with_statistics(self, **values: Tensor) -> LabelBatch:
        return dataclasses.replace(self, statistics={**self.statistics, **values})


_PER_PAIR = ("chosen", "rejected", "prompt", "margin", "p_chosen", "weight", "columns", "statistics")
_PER_LABEL = ("completion", "prompt", "label", "mismatched", "weight", "columns", "statistics")
_Examples = TypeVar("_Examples", CompletionFacts, PairBatch, LabelBatch)


@dataclass(frozen=True)
class PolicySequences:
    """The current policy on N completions.

    Only these tensors, and those of PolicyPairs and RewardPairs, carry a gradient in a preference loss.
    """

    logp: Tensor  # (N,) nats, sum over the scored tokens
    # (N, ...) each, by its name in the loss's ``needs``
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyPairs:
    """The current policy on N pairs; row i of both sides belongs to pair i."""

    chosen: PolicySequences
    rejected: PolicySequences


@dataclass(frozen=True)
class RewardPairs:
    """The scalar head's reward at the last token of N pairs, with gradient."""

    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)


@dataclass(frozen=True)
class ExampleTotals:
    """Counts over one optimizer update (all ranks, all micro-batches): the only denominators of a preference
    loss.
    """

    examples: int  # pairs, or completions if each is judged by itself


@dataclass(frozen=True)
class ExampleLoss:
    """Unreduced loss, one number per example, and metrics to be averaged over the examples of the update."""

    values: Tensor  # (N,) with gradient
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each, detached


def _check_examples(owner: CompletionFacts | PairBatch | LabelBatch, names: Sequence[str], rows: int) -> None:
    columns = {} if isinstance(owner, CompletionFacts) else owner.columns
    for name, value in {**{name: getattr(owner, name) for name in names}, **columns}.items():
        if value is not None and value.shape != (rows,):
            raise ValueError(
                f"{type(owner).__name__}.{name} has shape {tuple(value.shape)}, expected ({rows},)"
            )


def _select_rows(owner: _Examples, index: Tensor, names: Sequence[str]) -> _Examples:
    def pick(value: Any) -> Any:
        if isinstance(value, CompletionFacts):
            return value.rows(index)
        if isinstance(value, Mapping):
            return {key: pick(item) for key, item in value.items()}
        return value[index.to(value.device)] if isinstance(value, Tensor) and value.dim() else value

    return dataclasses.replace(owner, **{name: pick(getattr(owner, name)) for name in names})


def _move_to(owner: _Examples, device: torch.device | str, names: Sequence[str]) -> _Examples:
    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        return value.to(device) if isinstance(value, Tensor | CompletionFacts) else value

    return dataclasses.replace(owner, **{name: move(getattr(owner, name)) for name in names})
