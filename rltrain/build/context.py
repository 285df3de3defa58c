"""What a run is given besides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.process import Process

__all__ = ["RunContext"]


def _never() -> bool:
    return False


@dataclass(frozen=True)
class RunContext:
    """checkpoint: the folder to continue from; None: the run starts. should_stop: whether the run is to end
    after this step.

    digests: of code, data and models that the run reads besides its recipe.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    process: Process = field(default_factory=Process)
    should_stop: Callable[[], bool] = _never
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_fresh(self) -> bool:
        """Whether the run starts, so that no saved state replaces what is measured on the starting
        weights.
        """
        return self.checkpoint is None
