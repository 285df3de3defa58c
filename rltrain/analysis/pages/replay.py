"""What a report says of a run on another run's samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rltrain.checkpoint.run_folder import RunFolder

__all__ = ["LOW_ESS", "REPLAY_FILE", "list_low_steps", "replay_notes"]

REPLAY_FILE = "replay.json"  # in the run folder of a replay by another method
# Share of the completions: below it, a step's samples say little about the policy that learns from them.
LOW_ESS = 0.2


def list_low_steps(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps whose effective sample size is low, or unknown because a ratio was not finite."""
    return [
        step["step"]
        for step in steps
        if step["rollout/ess_completions"] is None or not step["rollout/ess_completions"] >= LOW_ESS
    ]


def replay_notes(folder: RunFolder) -> list[str]:
    """Sentences for the report of a replay by another method; empty for any other run."""
    path = folder.path / REPLAY_FILE
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    low = content["low"]
    changes = ", ".join(f"{key} {value}" for key, value in content["changes"].items())
    notes = [f"A replay on the samples of run {content['run']} with other settings: {changes}."]
    if low:
        steps = ", ".join(map(str, low[:20])) + (", ..." if len(low) > 20 else "")
        notes.append(
            f"{len(low)} of {len(content['steps'])} steps have an effective sample size below {LOW_ESS} of "
            f"their completions ({steps}): those samples are another policy's, and what was learned from "
            "them says little about this one."
        )
    return notes
