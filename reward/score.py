"""What a grader returns, and how one is declared. Importable without torch and without rltrain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Score:
    """One completion's score.

    ``ungraded`` names why there is none: such a completion is masked out and counted, never scored 0.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)  # logged by name, not summed into value
    ungraded: str | None = None  # "timeout", "memory", "error", "died", "nan", ...
    answer: str | None = field(
        default=None, compare=False
    )  # what the completion answers, where a grader found it; equal texts are one
    # of an ungraded one whose fault lies outside the completion: what failed, in words
    why: str | None = field(default=None, compare=False)
    extra: Mapping[str, str] = field(
        default_factory=dict, compare=False
    )  # texts that a transcript shows beside the completion

    @property
    def correct(self) -> bool | None:
        """Raw correctness: what the parts named ``correct`` (or ``<function>/correct``) say together;
        None if there is none.
        """
        verdicts = [
            value for name, value in self.parts.items() if name == "correct" or name.endswith("/correct")
        ]
        return all(value > 0 for value in verdicts) if verdicts else None


@dataclass(frozen=True, slots=True)
class Episode:
    """What became of one completion that was an episode in an environment."""

    reward: float  # sum over its steps
    parts: Mapping[str, float]  # numbers the environment reports of it
    turns: tuple[str, ...]  # what the policy wrote, turn by turn, without special tokens
    failure: str | None = (
        # why the environment could not say: "timeout", "error", "died", ...; the completion is left ungraded
        None
    )


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """Completions of one prompt, as every reward function receives them.

    Plain data: it crosses a process boundary.
    """

    prompt: str
    completions: tuple[str, ...]  # of an episode, the last turn
    token_counts: tuple[
        int, ...
    ]  # completion tokens, EOS included; of an episode, all turns and observations
    finish: tuple[str, ...]  # "stop" | "length" | "aborted"
    columns: Mapping[str, Any]  # the row's other columns: answer, ...
    episodes: tuple[Episode, ...] = ()  # one per completion where they are episodes, else empty
    prompt_ids: tuple[
        int, ...
    ] = ()  # token ids, for a reward model in the trainer's process; workers of a pool get none
    completion_ids: tuple[tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] | None = (
        None  # the prompt as the data have it, where they have messages
    )
    updates: int = 0  # optimizer updates that the policy had taken when it wrote these
    occasion: str = ""  # what they are graded for, in words: "step 12"


def is_float32(value: float) -> bool:
    """Whether a learner, which keeps rewards in float32, sees a finite number."""
    return math.isfinite(value) and abs(value) <= _LARGEST_FLOAT32


def reward(name: str, *, scope: Literal["completion", "group"] = "completion") -> Callable[[F], F]:
    """Declare ``function(inputs: RewardInputs, *, hp) -> list[Score]`` under ``name``.

    ``scope="group"`` says that a score depends on the other completions of the prompt, so that a failure
    costs the group; otherwise a failure costs its own completion only.
    """

    def declare(function: F) -> F:
        function.reward_name, function.reward_scope = name, scope  # type: ignore[attr-defined]
        return function

    return declare


def column_text(inputs: RewardInputs, column: str, reward_name: str) -> str:
    """The row's reference answer as text.

    Raises ValueError where the column is missing, empty, or neither text nor a number.
    """
    if column not in inputs.columns:
        there = ", ".join(sorted(inputs.columns)) or "none"
        raise ValueError(
            f"{reward_name}: the row has no column {column!r}; its columns are: {there}. Set answer_column "
            "or data.columns"
        )
    value = inputs.columns[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(
            f"{reward_name}: column {column!r} must hold the reference answer as text or a number, got "
            f"{value!r}"
        )
    return str(value)
