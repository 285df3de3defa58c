"""Rows beside the policy's own: the policy at another temperature, the frozen reference model, the data set's
answer.

A source adds rows to groups that the policy has already sampled and that dynamic sampling has kept. Its
completions carry its number (``types.samples.SOURCE_*``) and join the group of their prompt; the same reward functions
grade them, as a group of their own. A source with memory keeps it in ``state_dict``, which is part of every
checkpoint.
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
    """What sources draw on.

    sampling: the policy's own. prompts: every prompt that may come. reference: a context in which the engine
    holds the reference model's weights as ``REFERENCE_VERSION``; every rank enters it. encode: an answer's
    text to its tokens, EOS included. deadline: of the samples of one source.
    """

    sampler: Sampler
    sampling: Sampling
    prompts: Sequence[Prompt]
    reference: Callable[[], AbstractContextManager[None]]
    encode: Callable[[str], Sequence[int]]
    deadline: Deadline = no_deadline

    def sample(
        self, groups: Sequence[ScoredGroup], sampling: Sampling, policy: PolicyVersion
    ) -> list[RolloutGroup]:
        """Completions for the groups' prompts, under the groups' ids."""
        if not groups:
            return []
        prompts = [group.prompt for group in groups]
        sampled = sample_groups(self.sampler, prompts, sampling, policy, self.deadline)
        return [
            dataclasses.replace(more, group=group.group) for more, group in zip(sampled, groups, strict=True)
        ]


class SampleSource(ABC):
    """One source of further rows; unless it says otherwise, one that serves every group and remembers
    nothing.
    """

    code: ClassVar[int]  # in ``types``

    def choose(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        """The groups of a step that get rows of this source, equal on every rank."""
        return groups

    @abstractmethod
    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        """Completions for ``groups``, this rank's share of those chosen, under their own ids; a group without
        any is left out.

        Every rank calls it, with no groups as well. version: of the policy's weights, which the engine holds
        before and after.
        """

    def observe(self, entropy: float) -> None:
        """Called after every step. entropy: nats, the policy's, mean over the tokens its own source sampled."""
        del entropy

    def notes(self) -> dict[str, float]:
        """Numbers of the step just sampled: notes on its batch, for controls to read, and logged as
        ``control/<key>``.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What ``observe`` has left, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        del state


@method("aepo", arxiv="2510.08141", traits={"trains"})
class TemperedSamples(SampleSource):
    """The policy at a temperature that answers its entropy: AEPO, arXiv:2510.08141.

    The first ``share`` of a step's groups (the released quarter; the prompts come shuffled) is sampled again,
    as many completions each, at ``high`` while the entropy of the step before was at most ``target`` nats,
    and in the first step, else at ``low``. The entropy is the mean over the policy source's tokens; the authors'
    code takes the mean of -log-prob over the mixed batch, which the tempered, correct-only rows bias. Pair it
    with the control ``aepo``, which turns the correct rows into the REINFORCE term. Where a prompt has one
    correct completion only, that term points at it from every temperature: no target can be held there.
    """

    code = SOURCE_TEMPERED

    def __init__(
        self,
        means: SamplerContext,
        *,
        target: float = 0.5,
        high: float = 1.2,
        low: float = 0.8,
        share: float = 0.25,
    ) -> None:
        if not 0 <= share <= 1 or min(high, low) <= 0:
            raise ValueError(
                f"rollout.extra_samples aepo: share {share:g} must be within 0 to 1, high {high:g} and low {low:g} "
                "above 0"
            )
        self._means, self._target, self._high, self._low, self._share = means, target, high, low, share
        self._entropy: float | None = None  # of the step before; None: there was none

    @property
    def temperature(self) -> float:
        """Of the next step."""
        entropy = -math.inf if self._entropy is None else self._entropy
        return aepo_temperature(entropy, target=self._target, high=self._high, low=self._low)

    def choose(self, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        wanted = int(
            self._share * len(groups) + 1e-9
        )  # rounded down, though 0.29 x 100 is a little less than 29
        return groups[: max(wanted, 1 if self._share > 0 else 0)]

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        sampling = dataclasses.replace(
            self._means.sampling, temperature=self.temperature, seed=seed, source=self.code
        )
        return self._means.sample(groups, sampling, version)

    def observe(self, entropy: float) -> None:
        self._entropy = entropy if math.isfinite(entropy) else self._entropy

    def notes(self) -> dict[str, float]:
        above = self._entropy is not None and self._entropy > self._target
        return {"aepo_temperature": self.temperature, ABOVE_TARGET: float(above)}

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entropy = state["entropy"]


@method("reference", arxiv="2505.14264", traits={"for_advantage"})
class ReferenceSamples(SampleSource):
    """Completions of the frozen reference model (``model.reference``, else the starting point), graded but
    never trained on.

    ``n`` per prompt, by default as many as the policy's: AAPO, arXiv:2505.14264, pairs every sample of the
    policy with one of the reference. The engine generates them with the reference's weights under a version
    of their own, then takes the policy's back.
    """

    code = SOURCE_REFERENCE

    def __init__(self, means: SamplerContext, *, n: int | None = None) -> None:
        self._means, self._n = means, means.sampling.n if n is None else n
        if self._n < 1:
            raise ValueError(
                f"rollout.extra_samples reference: n is {n}; a prompt needs at least 1 completion of the reference"
            )

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        sampling = dataclasses.replace(self._means.sampling, n=self._n, seed=seed, source=self.code)
        with self._means.reference():
            return self._means.sample(groups, sampling, REFERENCE_VERSION)


@method("answer", arxiv="2508.07750", traits={"trains", "for_advantage"})
class DatasetAnswers(SampleSource):
    """The data set's own answer as one more row of each group, graded like any other: GRAO, arXiv:2508.07750.

    Its text is the prompt's ``column``, tokenised once, with an EOS. Its log-probs stand at 0 until the
    learner fills its own in. A prompt whose answer is longer than ``rollout.max_tokens`` gets no such row.
    Raises ValueError where a prompt has no such column.
    """

    code = SOURCE_DATASET

    def __init__(self, means: SamplerContext, *, column: str = "answer") -> None:
        self._answers = {prompt.id: _answer(prompt, column, means) for prompt in means.prompts}

    def sample(self, groups: Sequence[ScoredGroup], seed: int, version: int) -> list[RolloutGroup]:
        del seed
        found: list[RolloutGroup] = []
        for group in groups:
            if (answer := self._answers[group.prompt.id]) is not None:
                versions = (Span(0, len(answer.token_ids), version),)
                found.append(
                    RolloutGroup(group.group, group.prompt, (dataclasses.replace(answer, versions=versions),))
                )
        return found


def _answer(prompt: Prompt, column: str, means: SamplerContext) -> Completion | None:
    """The answer of ``prompt`` as a completion of no version yet; None where it is too long."""
    value = prompt.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(
            f"rollout.extra_samples answer: column {column!r} of prompt {prompt.id} must hold an answer as text or a "
            f"number, got {value!r}; its "
            f"columns are: {', '.join(sorted(prompt.columns)) or 'none'}. Name the right one: {{name: "
            "answer, column: ...}"
        )
    tokens = tuple(means.encode(str(value)))
    if len(tokens) > means.sampling.max_tokens:
        return None
    versions = (Span(0, len(tokens), 0),)
    return Completion(tokens, (0.0,) * len(tokens), "stop", str(value), versions, SOURCE_DATASET)
