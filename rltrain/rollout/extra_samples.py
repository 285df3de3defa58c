"""Sources of completions beside the policy's own: the policy at another temperature, the frozen reference
model, the data set's answer.

A source adds rows to groups that the policy has already sampled and that dynamic sampling has kept. Its
completions carry its number (``types.samples.SOURCE_*``) and join the group of their prompt; the same reward
functions grade them, as a group of their own. A source that remembers earlier steps keeps them in
``state_dict``, which is part of every checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from rltrain.control.entropy import ABOVE_TARGET, aepo_temperature
from rltrain.needs import CONTROL, FOR_ADVANTAGE, REFERENCE_WEIGHTS, SINGLE_TURN, TRAINS
from rltrain.protocols import Sampler
from rltrain.registry import method
from rltrain.rollout.groups import sample_groups
from rltrain.types.samples import (
    REFERENCE_VERSION,
    SOURCE_DATASET,
    SOURCE_REFERENCE,
    SOURCE_TEMPERED,
    Completion,
    PolicyVersion,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredGroup,
    Span,
)
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["DatasetAnswers", "ReferenceSamples", "SampleSource", "SamplerContext", "TemperedSamples"]


@dataclass(frozen=True)
class SamplerContext:
    """What the run provides to its sample sources.

    sampling: the policy's own. prompts: every prompt of the run. reference: a context in which the engine
    holds the reference model's weights as ``REFERENCE_VERSION``; every rank enters it. encode: an answer's
    text to its tokens, EOS included. deadline: for the samples of one source. reference_sampler: holds the
    reference model for good, so that the engine never does.
    """

    sampler: Sampler
    sampling: Sampling
    prompts: Sequence[Prompt]
    reference: Callable[[], AbstractContextManager[None]]
    encode: Callable[[str], Sequence[int]]
    deadline: Deadline = no_deadline
    reference_sampler: Sampler | None = None

    def sample(
        self,
        groups: Sequence[ScoredGroup],
        sampling: Sampling,
        policy: PolicyVersion,
        sampler: Sampler | None = None,
    ) -> list[RolloutGroup]:
        """Completions for the prompts of ``groups``, with the same group ids. sampler: in place of the
        policy's.
        """
        if not groups:
            return []
        prompts = [group.prompt for group in groups]
        sampled = sample_groups(sampler or self.sampler, prompts, sampling, policy, self.deadline)
        return [
            dataclasses.replace(added, group=group.group)
            for added, group in zip(sampled, groups, strict=True)
        ]


class SampleSource(ABC):
    """A source of further rows. By default it serves every group and remembers nothing."""

    code: ClassVar[int]  # ``types.samples.SOURCE_*``

    def choose(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        """The groups of a step that get rows of this source, equal on every rank."""
        return groups

    @abstractmethod
    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        """Completions for ``groups``, this rank's share of the chosen groups, with the same group ids; a
        group without any completion is left out.

        Every rank calls this, also with no groups. version: of the policy's weights, which the engine holds
        before and after.
        """

    def observe(self, entropy: float) -> None:
        """Called after every step. entropy: nats, of the policy, mean over the tokens it sampled itself."""
        del entropy

    def notes(self) -> dict[str, float]:
        """Numbers of the step just sampled. Controls can read them from its batch, and they are logged as
        ``control/<key>``.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What ``observe`` remembers, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``."""
        del state


@method("aepo", arxiv="2510.08141", traits={TRAINS, CONTROL("aepo")})
class TemperedSamples(SampleSource):
    """The policy at a temperature that depends on its entropy: AEPO, arXiv:2510.08141.

    The first ``share`` of a step's groups (a quarter, as released; the prompts come shuffled) is sampled
    again, with as many completions each. The temperature is ``high`` in the first step and where the entropy
    of the step before was at most ``target`` nats, else ``low``. The entropy is the mean over the tokens that
    the policy sampled itself; the authors' code takes the mean of -log-prob over the mixed batch, which the
    tempered, correct-only rows bias. Use it with the control ``aepo``, which turns the correct rows into the
    REINFORCE term. Where a prompt has a single correct completion, that term points at it from every
    temperature, so that no target entropy can be held there.
    """

    code = SOURCE_TEMPERED

    def __init__(
        self,
        context: SamplerContext,
        *,
        target: float = 0.5,
        high: float = 1.2,
        low: float = 0.8,
        share: float = 0.25,
    ) -> None:
        if not 0 <= share <= 1 or min(high, low) <= 0:
            raise ValueError(
                f"rollout.extra_samples aepo: share {share:g} must be within 0 to 1, high {high:g} and low "
                f"{low:g} above 0"
            )
        self._context = context
        self._target = target
        self._high = high
        self._low = low
        self._share = share
        self._entropy: float | None = None  # of the step before; None before the first step

    @property
    def temperature(self) -> float:
        """The temperature of the next step."""
        entropy = -math.inf if self._entropy is None else self._entropy
        return aepo_temperature(entropy, target=self._target, high=self._high, low=self._low)

    def choose(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        # rounded down; the addend corrects products such as 0.29 x 100, which is a little less than 29
        count = int(self._share * len(groups) + 1e-9)
        return groups[: max(count, 1 if self._share > 0 else 0)]

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        sampling = dataclasses.replace(
            self._context.sampling, temperature=self.temperature, seed=seed, source=self.code
        )
        return self._context.sample(groups, sampling, version)

    def observe(self, entropy: float) -> None:
        self._entropy = entropy if math.isfinite(entropy) else self._entropy

    def notes(self) -> dict[str, float]:
        above = self._entropy is not None and self._entropy > self._target
        return {"aepo_temperature": self.temperature, ABOVE_TARGET: float(above)}

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entropy = state["entropy"]


@method("reference", arxiv="2505.14264", needs={REFERENCE_WEIGHTS}, traits={FOR_ADVANTAGE})
class ReferenceSamples(SampleSource):
    """Completions of the frozen reference model (``model.reference``, else the initial policy), graded but
    never trained on.

    ``n`` per prompt, by default as many as the policy's: AAPO, arXiv:2505.14264, pairs every sample of the
    policy with one of the reference. The engine loads the reference's weights under a version of their own,
    generates, and loads the policy's weights again; ``rollout.reference_workers`` hold it for good.
    """

    code = SOURCE_REFERENCE

    def __init__(self, context: SamplerContext, *, n: int | None = None) -> None:
        self._context = context
        self._n = context.sampling.n if n is None else n
        if self._n < 1:
            raise ValueError(
                f"rollout.extra_samples reference: n is {n}; a prompt needs at least 1 completion of the "
                "reference"
            )

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        sampling = dataclasses.replace(self._context.sampling, n=self._n, seed=seed, source=self.code)
        with self._context.reference():
            others = self._context.reference_sampler
            return self._context.sample(groups, sampling, REFERENCE_VERSION, others)


@method("answer", arxiv="2508.07750", traits={TRAINS, FOR_ADVANTAGE, SINGLE_TURN})
class DatasetAnswers(SampleSource):
    """The data set's own answer as one more row of each group, graded like any other: GRAO, arXiv:2508.07750.

    Its text is the prompt's ``column``, tokenised once, with an EOS. Its log-probs are 0 until the learner
    fills in its own. A prompt whose answer is longer than ``rollout.max_tokens`` gets no such row. Raises
    ValueError where a prompt has no such column.
    """

    code = SOURCE_DATASET

    def __init__(self, context: SamplerContext, *, column: str = "answer") -> None:
        self._answers = {prompt.id: _answer_completion(prompt, column, context) for prompt in context.prompts}

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        del seed
        answered: list[RolloutGroup] = []
        for group in groups:
            if (answer := self._answers[group.prompt.id]) is not None:
                versions = (Span(0, len(answer.token_ids), version),)
                answer = dataclasses.replace(answer, versions=versions)
                answered.append(RolloutGroup(group.group, group.prompt, (answer,)))
        return answered


def _answer_completion(prompt: Prompt, column: str, context: SamplerContext) -> Completion | None:
    """The answer of ``prompt`` as a completion, without a version yet; None where it is too long."""
    value = prompt.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(
            f"rollout.extra_samples answer: column {column!r} of prompt {prompt.id} must hold an answer as "
            f"text or a number, got {value!r}; its columns are: "
            f"{', '.join(sorted(prompt.columns)) or 'none'}. Name the right one: "
            "{name: answer, column: ...}"
        )
    tokens = tuple(context.encode(str(value)))
    if len(tokens) > context.sampling.max_tokens:
        return None
    versions = (Span(0, len(tokens), 0),)
    return Completion(tokens, (0.0,) * len(tokens), "stop", str(value), versions, SOURCE_DATASET)
