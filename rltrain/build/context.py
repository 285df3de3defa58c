"""The inputs of a run besides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.process import Process

__all__ = ["RunContext"]


def _no_stop_request() -> bool:
    return False


@dataclass(frozen=True)
class RunContext:
    """checkpoint: the folder to continue from; None: a new run. should_stop: whether the run must end
    after this step.

    digests: of the code, data and models that the run reads besides its recipe.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    process: Process = field(default_factory=Process)
    should_stop: Callable[[], bool] = _no_stop_request
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_fresh(self) -> bool:
        """Whether the run is new, so that no saved state replaces what is measured on its first weights."""
        return self.checkpoint is None
