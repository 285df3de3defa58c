"""The inputs of a run besides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain.checkpoint.run_folder import RunFolder
from rltrain.process import Process

__all__ = ["RunContext"]


def _no_stop_request() -> bool:
    return False


@dataclass(frozen=True)
class RunContext:
    """checkpoint: the folder to continue from; None: a new run. should_stop: whether the run must end
    after this step.

    digests: of the code, data and models that the run reads besides its recipe. replayed: makes the parts
    that take the place of an engine, for a run on another's samples.
    """

    folder: RunFolder
    checkpoint: Path | None = None
    process: Process = field(default_factory=Process)
    should_stop: Callable[[], bool] = _no_stop_request
    digests: Mapping[str, str] = field(default_factory=dict)
    replayed: Callable[[Any], Any] | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether the run is new, so that no saved state replaces what is measured on its first weights."""
        return self.checkpoint is None
