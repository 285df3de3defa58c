"""The nouns that stages exchange. All frozen; letters are defined here once.

B  completions in a rollout step          T  completion tokens, right-padded at the loss border
G  completions of one prompt              N  preference examples            V  vocabulary

Log-probs and entropies are in nats, float32. Column ``t`` of a ``(B, T)`` tensor belongs to completion token ``t``; the
off-by-one shift between logits and tokens happens in ``learner/forward.py`` and nowhere else. Groups, versions, prompts,
arms and turns are carried as ids, never as positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from reward.score import Episode, Score

__all__ = [
    "AdaptiveTemperature",
    "Completion",
    "CompletionFacts",
    "Episode",
    "ExampleLoss",
    "ExampleTotals",
    "Finish",
    "LabelBatch",
    "PairBatch",
    "PolicyPairs",
    "PolicySequences",
    "PolicyTokens",
    "Prompt",
    "RewardPairs",
    "RolloutGroup",
    "Sampling",
    "Score",
    "ScoredGroup",
    "StepTotals",
    "TokenLoss",
    "TokenRows",
    "TrainBatch",
]

Finish = Literal["stop", "length", "aborted"]

# Where a row of a step comes from. Rows of one prompt share their group id, whatever their arm.
ARM_POLICY = 0  # sampled from the policy at rollout.temperature
ARM_TEMPERED = 1  # sampled from the policy at another temperature (AEPO, arXiv:2510.08141)
ARM_REFERENCE = 2  # sampled from the frozen reference model (AAPO, arXiv:2505.14264)
ARM_ANSWER = 3  # the data set's own answer, sampled by nobody (GRAO, arXiv:2508.07750)
ARM_NAMES = {ARM_POLICY: "policy", ARM_TEMPERED: "tempered", ARM_REFERENCE: "reference", ARM_ANSWER: "answer"}

REFERENCE_VERSION = -1  # what rows and engines call the weights of the reference model: no update of the learner made them


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, rendered and tokenised once; nothing downstream tokenises it again."""

    id: str  # stable across runs: data set name and row, never a position in a batch
    token_ids: tuple[int, ...]  # (P,) with the chat template and generation prompt applied
    text: str  # what token_ids spell, for transcripts and graders
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other column of the row (answer, ...), for the rewards
    messages: tuple[Mapping[str, Any], ...] | None = None  # as the data set has them, the system message first; None: it has text


@dataclass(frozen=True, slots=True)
class AdaptiveTemperature:
    """HAPO's sampler, arXiv:2509.16591: each token's own temperature, from the entropy of its raw distribution.

    The formula is ``control/hapo.py``'s ``adaptive_temperature``; the four numbers are its ``EntropySignal``, of the step before.
    """

    tau: float  # T = T0 (1 + tau h_hat)
    variant: Literal["scaled", "released", "unscaled"]
    pivot: float  # of ln H
    sigma: float
    top: float  # largest h, above 0
    bottom: float  # smallest h, below 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """What one arm of a rollout asks of an engine.

    The log-probs an engine returns are those a learner at ``temperature`` computes, of the distribution sampled from, so nothing
    that it cannot reproduce (top-p, top-k, penalties) exists here. ``temperature`` 0 is greedy decoding, reported with the
    log-probs at temperature 1. With ``adaptive`` tokens are drawn at temperatures around ``temperature`` and reported at
    ``temperature`` all the same: HAPO's ratio is to the policy at its base temperature, and mismatch goes on measuring engines.
    """

    n: int  # completions per prompt
    temperature: float
    max_tokens: int  # completion tokens, EOS included
    seed: int  # of the step and arm; engines derive one seed per (seed, prompt id, sample index)
    arm: int = ARM_POLICY
    adaptive: AdaptiveTemperature | None = None  # None: every token at ``temperature``
    sharpen_below: float | None = None  # nats: EM-INF (arXiv:2505.15134), at test time and with the transformers engine only
    cache: str = ""  # what an engine remembers of a prompt serves later calls of the same version and the same ``cache`` only


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: tuple[int, ...]  # (t,) as sampled, a final EOS included
    logprobs: tuple[float, ...]  # (t,) nats, of the distribution sampled from, temperature included
    finish: Finish
    text: str  # decoded without special tokens
    version: int  # policy version that sampled it
    arm: int = ARM_POLICY
    turns: tuple[tuple[int, int], ...] = ()  # token spans [start, stop) the policy wrote; () means the whole completion
    episode: Episode | None = None  # what became of it in an environment; None: it was none

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probs in one completion")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Token spans [start, stop) the policy wrote."""
        return self.turns or ((0, len(self.token_ids)),)

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy wrote: all but what an environment put between its turns."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """One prompt and the completions sampled for it. ``group`` ids are unique within a step."""

    group: int
    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with one score per completion, same order."""

    group: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.scores):
            raise ValueError(f"group {self.group}: {len(self.completions)} completions but {len(self.scores)} scores")


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids of the B rows of a step, ragged; row i belongs to row i of the step's TrainBatch."""

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.completions)} completions")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> TokenRows:
        """The rows at the positions ``index`` (int64), in that order."""
        return TokenRows(tuple(self.prompts[at] for at in index.tolist()), tuple(self.completions[at] for at in index.tolist()))


_PER_TOKEN = (
    *("advantages", "weights", "old_logp", "rollout_logp", "logp_now", "old_entropy", "entropy_now"),
    *("ref_logp", "teacher_logp", "process_reward", "step_id"),
)
_PER_ROW = ("rewards", "group", "arm", "version", "sample", "correct", "answer")


@dataclass(frozen=True)
class TrainBatch:
    """The small tensors of one optimizer step (or of some of its rows), all detached.

    A field is ``None`` when no function of the recipe needs it: the learner computes the union of what they declare.
    ``mask`` may arrive as any dtype and is kept as bool.
    """

    mask: Tensor  # (B, T) bool, True where the policy wrote the token and it counts in the loss
    advantages: Tensor  # (B, T)
    weights: Tensor  # (B, T) multiplies the per-token policy loss, starts at 1
    rewards: Tensor  # (B,)
    group: Tensor  # (B,) int64, id of the prompt group
    arm: Tensor  # (B,) int64
    version: Tensor  # (B,) int64, policy version that sampled the row
    sample: Tensor | None = None  # (B,) int64, which completion of its group, from 0; with the group it names the row
    rollout_logp: Tensor | None = None  # (B, T) nats, reported by the engine
    old_logp: Tensor | None = None  # (B, T) nats, learner's, before the first update of the step
    logp_now: Tensor | None = None  # (B, T) nats, learner's, at the start of the optimizer batch in hand
    old_entropy: Tensor | None = None  # (B, T) nats
    ref_logp: Tensor | None = None  # (B, T) nats, frozen reference
    teacher_logp: Tensor | None = None  # (B, T) nats
    process_reward: Tensor | None = None  # (B, T) nats, log-ratio of a process reward model and its reference (PRIME)
    entropy_now: Tensor | None = None  # (B, T) nats, the learner's, at the start of the optimizer batch in hand
    step_id: Tensor | None = None  # (B, T) int64, which turn or reasoning step a token belongs to, from 0 in each row; -1 outside the mask
    correct: Tensor | None = None  # (B,) 1 right, 0 wrong, NaN where no reward function says; raw, before any penalty
    answer: Tensor | None = None  # (B,) int64, equal for equal extracted answers of one group, -1 without an answer
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # (B, T) each: what a control hands to the loss of its method
    notes: Mapping[str, float] = field(default_factory=dict)  # numbers a control wants logged, as ``control/<key>``

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self.mask.bool())
        rows, shape = self.mask.shape[0], self.mask.shape
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"TrainBatch.{name} has shape {tuple(value.shape)}, the mask {tuple(shape)}")
        for name, value in self.extra.items():
            if value.shape != shape:
                raise ValueError(f"TrainBatch.extra[{name!r}] has shape {tuple(value.shape)}, the mask {tuple(shape)}")
        for name in _PER_ROW:
            value = getattr(self, name)
            if value is not None and value.shape != (rows,):
                raise ValueError(f"TrainBatch.{name} has shape {tuple(value.shape)}, expected ({rows},)")

    @property
    def totals_of_mask(self) -> tuple[int, int]:
        """(tokens, sequences with at least one token) that count in this batch."""
        per_row = self.mask.sum(dim=1)
        return int(per_row.sum()), int((per_row > 0).sum())

    def replace(self, **changes: Any) -> TrainBatch:
        return dataclasses.replace(self, **changes)

    def with_extra(self, **tensors: Tensor) -> TrainBatch:
        """With ``extra`` extended: (B, T) tensors from a control to the loss of its method."""
        return dataclasses.replace(self, extra={**self.extra, **tensors})

    def noted(self, **numbers: float) -> TrainBatch:
        """With ``notes`` extended: logged as ``control/<key>``."""
        return dataclasses.replace(self, notes={**self.notes, **numbers})

    def rows(self, index: Tensor | Sequence[int], width: int | None = None) -> TrainBatch:
        """The rows ``index`` (int64 ids of positions in this batch), cut to the first ``width`` token columns."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.mask.device)
        cut = {name: value[index][:, :width] for name in ("mask", *_PER_TOKEN) if (value := getattr(self, name)) is not None}
        picked = {name: value[index] for name in _PER_ROW if (value := getattr(self, name)) is not None}
        extra = {name: value[index][:, :width] for name, value in self.extra.items()}
        return dataclasses.replace(self, **cut, **picked, extra=extra)

    def to(self, device: torch.device | str) -> TrainBatch:
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tensors = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors, extra={name: value.to(device) for name, value in self.extra.items()})


@dataclass(frozen=True)
class PolicyTokens:
    """The current policy's statistics: the only tensors with a gradient. A statistic nobody needs is absent."""

    logp: Tensor  # (B, T) nats, at the sampling temperature
    entropy: Tensor | None = None  # (B, T) nats
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # (B, T) each, by the name a function's ``needs`` asked for


@dataclass(frozen=True)
class StepTotals:
    """Counts over one optimizer update: all ranks, all micro-batches. Every denominator comes from here."""

    tokens: int  # masked-in tokens
    sequences: int  # rows with at least one of them
    max_tokens: int  # the constant L_max: rollout.max_tokens, never the padded width


@dataclass(frozen=True)
class TokenLoss:
    """Unreduced loss, (B, T) per token or (B, 1) per sequence, and metrics to be averaged over the masked tokens."""

    values: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each (B, T) or (B, 1), detached


_PER_EXAMPLE = ("length", "ref_logp", "previous_logp", "logp_now")


@dataclass(frozen=True)
class CompletionFacts:
    """What is known of N completions before the gradient pass, all detached. A log-prob is a sum over the scored tokens.

    Scored tokens are the completion's, its final EOS included, without prompt and template. A field is ``None`` when the
    loss does not need it.
    """

    length: Tensor  # (N,) scored tokens, at least 1
    ref_logp: Tensor | None = None  # (N,) nats, frozen reference
    previous_logp: Tensor | None = None  # (N,) nats, frozen previous iterate (INPO's pi_t)
    logp_now: Tensor | None = None  # (N,) nats, the learner's, at the start of the optimizer batch in hand

    def __post_init__(self) -> None:
        _check_examples(self, _PER_EXAMPLE, self.length.shape[0])

    def rows(self, index: Tensor) -> CompletionFacts:
        return _picked(self, index, _PER_EXAMPLE)

    def to(self, device: torch.device | str) -> CompletionFacts:
        return _moved(self, device, _PER_EXAMPLE)


@dataclass(frozen=True)
class PairBatch:
    """N preference pairs of one optimizer update (or some of them), all detached; row i of both sides answers one prompt.

    ``statistics`` hold what a loss needs to know about the whole optimizer batch (all ranks): ``loss/preference/statistics.py``
    puts them in before the batch is cut into micro-batches.
    """

    chosen: CompletionFacts
    rejected: CompletionFacts
    prompt: Tensor  # (N,) int64, equal for pairs of one prompt
    margin: Tensor | None = None  # (N,) score of chosen minus score of rejected, in the data's units
    p_chosen: Tensor | None = None  # (N,) probability that chosen is the better one
    weight: Tensor | None = None  # (N,) multiplies an example's loss; None: 1
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each: numeric columns of the data that a loss asks for
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # () or (N,) each, over the whole optimizer batch

    def __post_init__(self) -> None:
        _check_examples(self, ("prompt", "margin", "p_chosen", "weight"), len(self))
        if self.rejected.length.shape[0] != len(self):
            raise ValueError(f"{len(self)} chosen completions but {self.rejected.length.shape[0]} rejected")

    def __len__(self) -> int:
        return self.chosen.length.shape[0]

    def rows(self, index: Tensor | Sequence[int]) -> PairBatch:
        """The pairs at the positions ``index``; statistics over the whole batch stay what they are."""
        return _picked(self, torch.as_tensor(index, dtype=torch.int64), _PER_PAIR)

    def to(self, device: torch.device | str) -> PairBatch:
        return _moved(self, device, _PER_PAIR)

    def with_statistics(self, **values: Tensor) -> PairBatch:
        return dataclasses.replace(self, statistics={**self.statistics, **values})


@dataclass(frozen=True)
class LabelBatch:
    """N completions of one optimizer update (or some of them), each judged by itself, all detached. See PairBatch."""

    completion: CompletionFacts
    prompt: Tensor  # (N,) int64, equal for completions of one prompt
    label: Tensor | None = None  # (N,) float, 1 desirable or correct, 0 not; soft labels in between where a loss allows them
    mismatched: CompletionFacts | None = None  # prompt i with another prompt's completion: KTO's estimate of the KL
    weight: Tensor | None = None  # (N,) multiplies an example's loss; None: 1
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # () or (N,) each, over the whole optimizer batch

    def __post_init__(self) -> None:
        _check_examples(self, ("prompt", "label", "weight"), len(self))
        if self.mismatched is not None and self.mismatched.length.shape[0] != len(self):
            raise ValueError(f"{len(self)} completions but {self.mismatched.length.shape[0]} mismatched ones")

    def __len__(self) -> int:
        return self.completion.length.shape[0]

    def rows(self, index: Tensor | Sequence[int]) -> LabelBatch:
        """The completions at the positions ``index``; statistics over the whole batch stay what they are."""
        return _picked(self, torch.as_tensor(index, dtype=torch.int64), _PER_LABEL)

    def to(self, device: torch.device | str) -> LabelBatch:
        return _moved(self, device, _PER_LABEL)

    def with_statistics(self, **values: Tensor) -> LabelBatch:
        return dataclasses.replace(self, statistics={**self.statistics, **values})


_PER_PAIR = ("chosen", "rejected", "prompt", "margin", "p_chosen", "weight", "columns", "statistics")
_PER_LABEL = ("completion", "prompt", "label", "mismatched", "weight", "columns", "statistics")
_Examples = TypeVar("_Examples", CompletionFacts, PairBatch, LabelBatch)


@dataclass(frozen=True)
class PolicySequences:
    """The current policy's N completions: with PolicyPairs and RewardPairs the only tensors of a preference loss with a gradient."""

    logp: Tensor  # (N,) nats, sum over the scored tokens
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...) each, by the name a loss's ``needs`` asked for


@dataclass(frozen=True)
class PolicyPairs:
    """The current policy on N pairs; row i of both belongs to pair i."""

    chosen: PolicySequences
    rejected: PolicySequences


@dataclass(frozen=True)
class RewardPairs:
    """The scalar head's reward at the last token of N pairs, with gradient."""

    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)


@dataclass(frozen=True)
class ExampleTotals:
    """Counts over one optimizer update: all ranks, all micro-batches. A preference loss is divided by these and nothing else."""

    examples: int  # pairs, or completions where each is judged by itself


@dataclass(frozen=True)
class ExampleLoss:
    """Unreduced loss, one number per example, and metrics to be averaged over the examples of the update."""

    values: Tensor  # (N,) with gradient
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each, detached


def _check_examples(owner: CompletionFacts | PairBatch | LabelBatch, names: Sequence[str], rows: int) -> None:
    columns = {} if isinstance(owner, CompletionFacts) else owner.columns
    for name, value in {**{name: getattr(owner, name) for name in names}, **columns}.items():
        if value is not None and value.shape != (rows,):
            raise ValueError(f"{type(owner).__name__}.{name} has shape {tuple(value.shape)}, expected ({rows},)")


def _picked(owner: _Examples, index: Tensor, names: Sequence[str]) -> _Examples:
    def pick(value: Any) -> Any:
        if isinstance(value, CompletionFacts):
            return value.rows(index)
        if isinstance(value, Mapping):
            return {key: pick(item) for key, item in value.items()}
        return value[index.to(value.device)] if isinstance(value, Tensor) and value.dim() else value

    return dataclasses.replace(owner, **{name: pick(getattr(owner, name)) for name in names})


def _moved(owner: _Examples, device: torch.device | str, names: Sequence[str]) -> _Examples:
    def move(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        return value.to(device) if isinstance(value, Tensor | CompletionFacts) else value

    return dataclasses.replace(owner, **{name: move(getattr(owner, name)) for name in names})
