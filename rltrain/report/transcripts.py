"""transcripts.jsonl: the completions and their scores for a few prompts of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rltrain.report.sinks import JsonLines
from rltrain.report.token_numbers import TokenNumbers, TokenTensors
from rltrain.reward.score import Score
from rltrain.types.samples import Completion, ScoredGroup


class Transcripts:
    """Writes the completions of the first ``groups_per_step`` prompts of each step; 0 writes none.

    numbers: chooses the tokens that get numbers; None: none do.
    """

    def __init__(self, path: Path, groups_per_step: int, numbers: TokenNumbers | None = None) -> None:
        self._lines = JsonLines(path)
        self._groups_per_step = groups_per_step
        self._numbers = numbers

    def log(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        stage: str = "rollout",
        tensors: TokenTensors | None = None,
    ) -> list[dict[str, Any]]:
        """The records that it writes. stage: "rollout", or "eval" for held-out prompts. tensors: the step's,
        for the tokens' numbers.
        """
        records = []
        for group in groups[: self._groups_per_step]:
            record = transcript(step, group, stage)
            if tensors is not None and self._numbers is not None and self._numbers.is_due(step):
                for completion, numbers in zip(
                    record["completions"], self._numbers.records(group, tensors), strict=True
                ):
                    completion |= {} if numbers is None else {"token_numbers": numbers}
            self._lines.append(record)
            records.append(record)
        return records

    def close(self) -> None:
        self._lines.close()


def transcript(step: int, group: ScoredGroup, stage: str = "rollout") -> dict[str, Any]:
    """One group as a JSON object: the prompt once, every completion with its score."""
    return {
        "step": step,
        "stage": stage,
        "group": group.group,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "completions": [
            _completion_record(completion, score)
            for completion, score in zip(group.completions, group.scores, strict=True)
        ],
    }


def _completion_record(completion: Completion, score: Score) -> dict[str, Any]:
    """A completion with its score; an ungraded one has null and the reason, not 0."""
    graded = score.ungraded is None
    return {
        "text": completion.text,
        **({"turns": list(completion.episode.turns)} if completion.episode is not None else {}),
        "score": _finite(score.value) if graded else None,
        "parts": _finite_parts(score.parts),
        **({"extra": dict(score.extra)} if score.extra else {}),
        "ungraded": score.ungraded,
        "finish": completion.finish,
        "tokens": len(completion.token_ids),
        "version": completion.oldest_version,
        "source": completion.source,
    }


def _finite_parts(parts: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in parts.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
