"""The samples of a policy: prompts, requests, completions and groups.

This module imports no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rltrain.reward.score import Episode, Score

Finish = Literal["stop", "length", "aborted"]

# The source of a row of a step. Rows of one prompt share their group id, whatever their source.
SOURCE_POLICY = 0  # sampled from the policy at rollout.temperature
SOURCE_TEMPERED = 1  # sampled from the policy at another temperature (AEPO, arXiv:2510.08141)
SOURCE_REFERENCE = 2  # sampled from the frozen reference model (AAPO, arXiv:2505.14264)
SOURCE_DATASET = 3  # the data set's answer, which no model sampled (GRAO, arXiv:2508.07750)
SOURCE_NAMES = {
    SOURCE_POLICY: "policy",
    SOURCE_TEMPERED: "tempered",
    SOURCE_REFERENCE: "reference",
    SOURCE_DATASET: "answer",
}

PolicyVersion = int  # identifies the weights that sample: the learner's number of updates, or the one below
REFERENCE_VERSION: PolicyVersion = -1  # the weights of the reference model


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, rendered and tokenised once; no later stage tokenises it again."""

    id: str  # stable across runs: data set name and row, never a position in a batch
    token_ids: tuple[int, ...]  # (P,) with the chat template and generation prompt applied
    text: str  # the text of token_ids, for transcripts and graders
    # every other column of the row (answer, ...), for the rewards
    columns: Mapping[str, Any] = field(default_factory=dict)
    # the data set's messages, the system message first; None if it holds text
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class AdaptiveTemperature:
    """HAPO's sampler, arXiv:2509.16591: each token's own temperature, from the entropy of its raw
    distribution.

    The formula is ``adaptive_temperature`` in ``control/hapo.py``; the last four numbers are the previous
    step's ``EntropySignal``.
    """

    tau: float  # T = T0 (1 + tau h_hat)
    variant: Literal["scaled", "released", "unscaled"]
    pivot: float  # of ln H
    sigma: float
    top: float  # largest h, above 0
    bottom: float  # smallest h, below 0


@dataclass(frozen=True, slots=True)
class Truncation:
    """The tokens that may be drawn, as a prefix of those in descending order of probability.

    Each rule looks at the tokens that the rules before it have kept, in this order: min_p, top_h, top_k,
    top_p. The likeliest token always stays.
    """

    min_p: float = 0.0  # arXiv:2407.01082: of at least this share of the largest probability
    # arXiv:2509.02510: while the entropy of what is kept is at most this share of the distribution's
    top_h: float | None = None
    top_k: int = 0  # the likeliest; 0: all
    top_p: float = 1.0  # arXiv:1904.09751: until their probabilities sum up to this share

    @property
    def is_whole(self) -> bool:
        """Whether every token may be drawn."""
        return self == Truncation()


@dataclass(frozen=True, slots=True)
class TokenSets:
    """For each token of a completion the tokens that it was drawn from, one set after another."""

    ids: array[int]  # of all sets
    sizes: array[int]  # (t,) tokens of each set
    mass: array[float]  # (t,) probability of each set before the others were cut off

    @classmethod
    def empty(cls) -> TokenSets:
        return cls(array("i"), array("i"), array("f"))

    def append(self, ids: array[int], mass: float) -> None:
        """Adds the set of one more token."""
        self.ids.extend(ids)
        self.sizes.append(len(ids))
        self.mass.append(mass)

    def first(self, count: int) -> TokenSets:
        """The sets of the first ``count`` tokens."""
        return TokenSets(self.ids[: sum(self.sizes[:count])], self.sizes[:count], self.mass[:count])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one source of a rollout is sampled.

    An engine returns the log-probs of the distribution that it sampled from: at ``temperature``, and over the
    tokens that ``truncation`` keeps. The learner computes the same ones from the sets of tokens that an
    engine returns with ``returns_kept``. It cannot reproduce ``repetition_penalty``: that is for evaluations.
    ``temperature`` 0 is greedy decoding, reported with the log-probs at temperature 1. With ``adaptive``,
    tokens are drawn at temperatures around ``temperature`` but reported at ``temperature``: HAPO's ratio is
    to the policy at its base temperature, and the mismatch metrics still compare engines.
    """

    n: int  # completions per prompt
    temperature: float
    max_tokens: int  # completion tokens, EOS included
    seed: int  # of the step and source; engines derive one seed per (seed, prompt id, sample index)
    source: int = SOURCE_POLICY
    adaptive: AdaptiveTemperature | None = None  # None: every token at ``temperature``
    truncation: Truncation = Truncation()
    returns_kept: bool = False  # completions come with the tokens that each of their tokens was drawn from
    # arXiv:1909.05858: divides the positive logits of tokens that the text has already, multiplies the others
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end a completion, which keeps them
    # nats: EM-INF (arXiv:2505.15134), only at test time and with the transformers engine
    sharpen_below: float | None = None
    # an engine reuses its cache of a prompt only in calls with the same version and the same ``cache``
    cache: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Samples ``first`` to ``first + count - 1`` of a prompt's group: the whole group, or a part of it.

    Each sample has its own seed (``Sampling.seed``), so that a group sampled in parts has the same tokens as
    one sampled at once.
    """

    prompt: Prompt
    sampling: Sampling
    first: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.first + self.count <= self.sampling.n:
            raise ValueError(
                f"prompt {self.prompt.id!r}: {self.count} samples from number {self.first} on were "
                f"requested; expected at least 1, all within a group of n = {self.sampling.n}"
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of a completion, all sampled by one version of the policy."""

    start: int
    stop: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt, token by token as it was sampled."""

    token_ids: tuple[int, ...]  # (t,) as sampled, a final EOS included
    logprobs: tuple[float, ...]  # (t,) nats, of the distribution sampled from, temperature included
    finish: Finish
    text: str  # decoded without special tokens
    # versions that sampled it, without gaps; tokens of an environment belong to the span around them
    versions: tuple[Span, ...]
    source: int = SOURCE_POLICY
    # token spans [start, stop) that the policy wrote; () means the whole completion
    turns: tuple[tuple[int, int], ...] = ()
    episode: Episode | None = None  # its outcome in an environment; None if there was no environment
    kept: TokenSets | None = None  # None: every token was drawn from the whole vocabulary
    # which of several workers sampled it, for the metrics; the tokens do not depend on it
    worker: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probs in one completion"
            )
        if self.kept is not None and len(self.kept.sizes) != len(self.token_ids):
            raise ValueError(
                f"{len(self.token_ids)} tokens but {len(self.kept.sizes)} sets that they were drawn from"
            )
        starts = [0, *(span.stop for span in self.versions)]
        if not self.versions or [*(span.start for span in self.versions), len(self.token_ids)] != starts:
            raise ValueError(
                f"a completion of {len(self.token_ids)} tokens whose versions cover {self.versions}"
            )

    @property
    def oldest_version(self) -> PolicyVersion:
        """The oldest version that sampled any of its tokens."""
        return min(span.version for span in self.versions)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Token spans [start, stop) that the policy wrote."""
        return self.turns or ((0, len(self.token_ids)),)

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy wrote: all except an environment's tokens between its turns."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True)
class Answer:
    """The completions of one request, in the order of their samples."""

    request: int  # position of the request in the call
    prompt: Prompt  # the request's prompt, or the one that an environment asked in its place
    completions: tuple[Completion, ...]


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
            raise ValueError(
                f"group {self.group}: {len(self.completions)} completions but {len(self.scores)} scores"
            )
