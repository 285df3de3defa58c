"""What an environment is. Imports no torch: environments live in small processes (``worker.py``).

``config/check.py`` lists the modules of those that come with the package. A user's own is named as
``path/to/file.py:Class``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Environment", "Step", "Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the data set, as an environment receives it. Plain data: it crosses a process boundary."""

    id: str
    text: str  # the prompt as the policy would read it
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment makes of one turn of the policy."""

    observation: str = ""  # what the policy reads next; nobody reads it after the last step
    done: bool = False
    reward: float = 0.0  # of this step; an episode's is their sum
    parts: Mapping[str, float] = field(
        default_factory=dict
    )  # numbers of the episode so far, logged by name; the last step's stand


class Environment(Protocol):
    """One episode after another. Text in, text out: tokens are the driver's business
    (``episodes.py``).

    Equal tasks, seeds and texts give equal observations: an episode whose process was lost is played again
    from its texts. A method that raises, or takes longer than the recipe allows, costs its own episode only,
    which is then left ungraded with the reason.
    """

    def reset(self, task: Task, seed: int) -> str | None:
        """Begin an episode.

        Returns what the policy is asked in place of the task's prompt, the same for every seed; None: that
        prompt.
        """
        ...

    def step(self, text: str) -> Step:
        """``text``: what the policy wrote in this turn, without special tokens."""
        ...

    def close(self) -> None:
        """The episode is over, whether it ended or not."""
        ...
