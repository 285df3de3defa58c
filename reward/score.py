"""The scores that graders return, and the declaration of graders. Importable without torch and rltrain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Score:
    """One completion's score.

    ``ungraded`` is the reason why there is none: such a completion is masked out and counted, never scored 0.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)  # logged by name, not summed into value
    ungraded: str | None = None  # "timeout", "memory", "error", "died", "nan", ...
    # The completion's answer, if a grader extracted it; equal texts are equal answers.
    answer: str | None = field(default=None, compare=False)
    # What failed, in words, if the completion is ungraded for a reason outside itself.
    why: str | None = field(default=None, compare=False)
    # Texts that a transcript shows beside the completion.
    extra: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def correct(self) -> bool | None:
        """Raw correctness: whether all parts named ``correct`` or ``<function>/correct`` are positive; None
        if there are none.
        """
        verdicts = [
            value for name, value in self.parts.items() if name == "correct" or name.endswith("/correct")
        ]
        return all(value > 0 for value in verdicts) if verdicts else None


@dataclass(frozen=True, slots=True)
class Episode:
    """The outcome of a completion that was an episode in an environment."""

    reward: float  # sum over its steps
    parts: Mapping[str, float]  # numbers that the environment reports about it
    turns: tuple[str, ...]  # the policy's texts, turn by turn, without special tokens
    # Why there is no outcome ("timeout", "error", "died", ...); the completion is then ungraded.
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """The completions of one prompt, as every reward function receives them.

    Plain data, because it crosses a process boundary.
    """

    prompt: str
    completions: tuple[str, ...]  # for an episode, the last turn
    # Numbers of completion tokens, EOS included; for an episode, of all turns and observations.
    token_counts: tuple[int, ...]
    finish: tuple[str, ...]  # "stop" | "length" | "aborted"
    columns: Mapping[str, Any]  # the row's other columns: answer, ...
    episodes: tuple[Episode, ...] = ()  # one per completion if they are episodes, else empty
    # Token ids, for a reward model in the trainer's process; a pool's workers get none.
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[tuple[int, ...], ...] = ()
    # The prompt as messages, if the data have messages.
    messages: tuple[Mapping[str, Any], ...] | None = None
    updates: int = 0  # optimizer updates of the policy that generated the completions
    occasion: str = ""  # the purpose of the grading, in words: "step 12"


def is_float32(value: float) -> bool:
    """Whether ``value`` is finite in float32, in which the learner keeps rewards."""
    return math.isfinite(value) and abs(value) <= _LARGEST_FLOAT32


def reward(
    name: str,
    *,
    scope: Literal["completion", "group"] = "completion",
    traits: Set[str] = frozenset(),
    check: Callable[[Mapping[str, Any], Any], Iterator[str]] | None = None,
) -> Callable[[F], F]:
    """Declares ``function(inputs: RewardInputs, *, hp) -> list[Score]`` under ``name``.

    ``scope="group"`` means that a score depends on the other completions of the prompt, so that a failure
    leaves the whole group ungraded; otherwise a failure leaves only its own completion ungraded. traits:
    those of ``rltrain/needs.py``. check: ``(values, recipe) -> Iterator[str]`` in the same file, that
    yields what is wrong with the hyperparameters ``values`` (defaults included) in this recipe. The last two
    are read from the source of rltrain's own graders.
    """

    def declare(function: F) -> F:
        function.reward_name = name  # type: ignore[attr-defined]
        function.reward_scope = scope  # type: ignore[attr-defined]
        return function

    return declare


def column_text(inputs: RewardInputs, column: str, reward_name: str) -> str:
    """The row's reference answer as text.

    Raises ValueError if the column is missing, empty, or neither text nor a number.
    """
    if column not in inputs.columns:
        columns = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"{reward_name}: the row has no column {column!r}; its columns are: {columns}. Set answer_column "
            "or data.columns"
        )
    value = inputs.columns[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(
            f"{reward_name}: column {column!r} must hold the reference answer as text or a number, got "
            f"{value!r}"
        )
    return str(value)
