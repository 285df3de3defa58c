"""The trackers' own libraries: numbers, tables of completions, and one run across a resume, read back."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rltrain.report.reporter import Reporter
from rltrain.report.sinks import open_sinks
from rltrain.report.tables import COLUMNS, completion_rows, markdown_table
from rltrain.report.transcripts import Transcripts
from rltrain.reward.score import Score
from rltrain.types.samples import Completion, Prompt, ScoredGroup, Span

ROOT = Path(__file__).parents[2]
# a run of two steps in a folder, with the trackers in the arguments
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from report.test_trackers import log_run
log_run(Path(sys.argv[1]), sys.argv[2], list(map(int, sys.argv[3:])))
"""
ROWS = [
    [1, "1+1", "2 | <b>", 1.0, "", "stop", 2],
    [1, "1+1", "no\nidea", None, "timeout", "length", 3],
]


def scored_group() -> ScoredGroup:
    completions = (
        Completion((7, 8), (-0.1, -0.2), "stop", "2 | <b>", (Span(0, 2, 0),)),
        Completion((7, 8, 9), (-0.1, -0.2, -0.3), "length", "no\nidea", (Span(0, 3, 0),)),
    )
    scores = (Score(1.0), Score(0.0, ungraded="timeout"))
    return ScoredGroup(0, Prompt("p1", (1, 2, 3), "1+1"), completions, scores)


def log_run(folder: Path, tracker: str, steps: list[int]) -> None:
    sinks = open_sinks(folder, [tracker], "rltrain-tests", {"seed": 1}, sys.exit, run_id="run7")
    reporter = Reporter(sinks, Transcripts(folder / "transcripts.jsonl", 1), None, tables_every=2)
    for step in steps:
        reporter.step(step, {"reward/mean": 0.25 * step}, [scored_group()], None)
    reporter.close()


def run_tracker(folder: Path, tracker: str, *steps: int) -> None:
    """In a process of its own: a tracker's threads end with it, and its settings are the environment's."""
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), tracker, *map(str, steps)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_rows_are_of_completions_and_markdown_shows_them_as_written():
    record = {
        "step": 1,
        "prompt": "1+1",
        "completions": [
            {"text": text, "score": score, "ungraded": why or None, "finish": finish, "tokens": tokens}
            for _, _, text, score, why, finish, tokens in ROWS
        ],
    }
    assert completion_rows([record]) == ROWS
    head, _, first, second = markdown_table(ROWS).splitlines()
    assert head == "| " + " | ".join(COLUMNS) + " |"
    assert first == "| 1 | 1+1 | 2 &#124; &lt;b> | 1.0 |  | stop | 2 |"
    assert second == "| 1 | 1+1 | no<br>idea |  | timeout | length | 3 |"


def test_tensorboard_has_tables_and_takes_back_the_steps_that_a_resumed_run_repeats(tmp_path: Path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (pip install rltrain[trackers])",
    )
    log_run(tmp_path, "tensorboard", [1, 2, 3])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        "".join(metrics.read_text().splitlines(keepends=True)[:1])
    )  # of a checkpoint after step 1
    log_run(tmp_path, "tensorboard", [2, 3])
    events: Any = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3]
    tables = events.Tensors("completions/rollout/text_summary")
    assert {event.step for event in tables} == {1, 2}  # TensorBoard takes back numbers, not texts
    assert b"timeout" in tables[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_wandb_offline_has_tables_and_a_resumed_run_goes_on_in_the_same_one(tmp_path: Path):
    pytest.importorskip("wandb", reason="wandb is not installed (pip install rltrain[trackers])")
    run_tracker(tmp_path, "wandb", 1, 2)
    run_tracker(tmp_path, "wandb", 3)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and {run.name.rpartition("-")[2] for run in runs} == {"run7"}
    files = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/completions/rollout_*.table.json"))
    tables = [json.loads(file.read_text()) for file in files]
    assert len(tables) == 2  # of steps 1 and 2
    assert tables[0]["columns"] == list(COLUMNS) and tables[0]["data"][1][3:5] == [None, "timeout"]
    assert [path for run in runs for path in run.glob("run-run7.wandb")]


@pytest.mark.slow
def test_trackio_has_numbers_and_tables_of_a_run_and_of_its_resumption_in_one(tmp_path: Path):
    pytest.importorskip("trackio", reason="trackio is not installed (pip install rltrain[trackers])")
    run_tracker(tmp_path, "trackio", 1, 2)
    run_tracker(tmp_path, "trackio", 3)
    with sqlite3.connect(tmp_path / "trackio/rltrain-tests.db") as database:
        lines = [
            (step, json.loads(data)) for step, data in database.execute("select step, metrics from metrics")
        ]
        names = {name for (name,) in database.execute("select distinct run_name from metrics")}
    database.close()
    assert names == {f"{tmp_path.name}-run7"}
    rewards = [(step, data["reward/mean"]) for step, data in lines if "reward/mean" in data]
    assert rewards == [(1, 0.25), (2, 0.5), (3, 0.75)]
    tables = [(step, data["completions/rollout"]) for step, data in lines if "completions/rollout" in data]
    assert [step for step, _ in tables] == [1, 2]
    assert tables[0][1]["_value"][1]["ungraded"] == "timeout"
