"""The completions of a run's page: read from transcripts.jsonl, within a budget of bytes.

A long run keeps many completions. The page takes the transcripts of as many evenly spaced steps as fit, the
first and the last among them, and cuts the middle out of very long texts; what is left out is counted.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUDGET = 4_000_000  # bytes of transcripts on a page
TEXT_LIMIT = 6_000  # characters of one completion, turn or prompt
_LINE = re.compile(rb'\{"step": (\d+), "stage": "(\w+)"')  # the start of a line, as transcripts.py writes it


@dataclass(frozen=True)
class CompletionSet:
    """Groups as JSON objects, with the numbers of prompts shown and kept in the file."""

    groups: tuple[dict[str, Any], ...]
    total: int
    steps_shown: int
    steps_total: int

    @property
    def has_numbers(self) -> bool:
        """Whether any completion has numbers of its tokens."""
        return any("tokenNumbers" in item for group in self.groups for item in group["completions"])


def read_completions(path: Path, budget: int = BUDGET) -> CompletionSet:
    """The groups of ``path`` that fit into ``budget`` bytes; none if there is no such file.

    Prompts of training, of evaluations, and with numbers of their tokens have equal parts of the budget.
    """
    lines = _scan_lines(path) if path.is_file() else []
    by_stage: dict[tuple[str, bool], list[_FileLine]] = {}
    for line in lines:
        by_stage.setdefault((line.stage, line.has_numbers), []).append(line)
    share = budget // max(1, len(by_stage))
    chosen = [line for stage in by_stage.values() for line in _choose_lines(stage, share)]
    groups = [
        group_record(record) for record in _read_lines(path, sorted(chosen, key=lambda line: line.start))
    ]
    mark_turned_right(groups)
    return CompletionSet(
        tuple(groups), len(lines), len({line.step for line in chosen}), len({line.step for line in lines})
    )


@dataclass(frozen=True)
class _FileLine:
    step: int
    stage: str
    has_numbers: bool
    start: int
    size: int


def _scan_lines(path: Path) -> list[_FileLine]:
    """Step, stage and place of every whole line; a line that is still being written is left out."""
    lines = []
    start = 0
    with open(path, "rb") as file:
        for text in file:
            match = _LINE.match(text)
            if match is not None and text.endswith(b"\n"):
                has_numbers = b'"token_numbers": ' in text
                lines.append(_FileLine(int(match[1]), match[2].decode(), has_numbers, start, len(text)))
            start += len(text)
    return lines


def _choose_lines(lines: Sequence[_FileLine], budget: int) -> list[_FileLine]:
    """All lines of evenly spaced steps, the first and the last step always."""
    steps = sorted({line.step for line in lines})
    total = sum(line.size for line in lines)
    count = len(steps)
    if total > budget:
        count = max(2, int(len(steps) * budget / total))
    if count >= len(steps):
        return list(lines)
    chosen = {steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)}
    return [line for line in lines if line.step in chosen]


def _read_lines(path: Path, lines: Sequence[_FileLine]) -> Iterator[dict[str, Any]]:
    if not lines:
        return
    with open(path, "rb") as file:
        for line in lines:
            file.seek(line.start)
            yield json.loads(file.read(line.size))


def group_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of transcripts.jsonl as the page shows it. rate: share of right completions, of all; None where
    no reward says what is right.
    """
    completions = [_completion_record(completion) for completion in record["completions"]]
    verdicts = [completion["correct"] for completion in completions]
    scores = [completion["score"] for completion in completions if completion["score"] is not None]
    is_known = any(verdict is not None for verdict in verdicts)
    return {
        "step": record["step"],
        "stage": record["stage"],
        "id": record["prompt_id"],
        "prompt": cut_text(record["prompt"]),
        "rate": sum(verdict is True for verdict in verdicts) / len(verdicts) if is_known else None,
        "mean": statistics.fmean(scores) if scores else None,
        "spread": max(scores) - min(scores) if scores else None,
        "turned": False,
        "completions": completions,
    }


def _completion_record(completion: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        "score": completion["score"],
        "parts": completion["parts"],
        "correct": _verdict(completion["parts"]) if completion["ungraded"] is None else None,
        "ungraded": completion["ungraded"],
        "finish": completion["finish"],
        "tokens": completion["tokens"],
        "version": completion["version"],
        "source": completion.get("source", 0),
    }
    turns = completion.get("turns")
    record |= (
        {"turns": [cut_text(turn) for turn in turns]} if turns else {"text": cut_text(completion["text"])}
    )
    if completion.get("token_numbers"):
        record["tokenNumbers"] = completion["token_numbers"]
    if completion.get("extra"):
        record["extra"] = {name: cut_text(text) for name, text in completion["extra"].items()}
    return record


def _verdict(parts: Mapping[str, float | None]) -> bool | None:
    """``Score.correct`` of parts that were written to a file."""
    verdicts = [value for name, value in parts.items() if name == "correct" or name.endswith("/correct")]
    return all((value or 0.0) > 0 for value in verdicts) if verdicts else None


def mark_turned_right(groups: Sequence[dict[str, Any]]) -> None:
    """Marks the groups of each prompt that was sampled at several steps, at first mostly wrong and at last
    mostly right.
    """
    by_prompt: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for group in groups:
        if group["rate"] is not None:
            by_prompt.setdefault((group["stage"], group["id"]), []).append(group)
    for occasions in by_prompt.values():
        occasions.sort(key=lambda group: group["step"])
        if occasions[0]["rate"] < 0.5 <= occasions[-1]["rate"]:
            for group in occasions:
                group["turned"] = True


def cut_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """``text``, or its beginning and end with the number of characters between them."""
    if len(text) <= limit:
        return text
    head = math.ceil(limit * 2 / 3)
    tail = limit - head
    return f"{text[:head]}\n[... {len(text) - limit} characters left out ...]\n{text[-tail:]}"
