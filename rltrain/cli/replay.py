"""``rltrain replay``: a finished run again from its journal, without engine and rewards."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rltrain.analysis.pages.replay import LOW_ESS, REPLAY_FILE, list_low_steps
from rltrain.build.outputs import QUIET
from rltrain.build.replay import Replay, build_replay, plan_replay
from rltrain.build.workflows import WORKFLOWS, workflow_for
from rltrain.checkpoint.manifest import file_hashes
from rltrain.checkpoint.run_folder import RunFolder, describe_environment, new_run_id, write_atomic
from rltrain.cli.session import is_main_process, joined_processes
from rltrain.cli.train import report_if_possible
from rltrain.config.load import resolved_yaml
from rltrain.errors import UserError, user_mistakes
from rltrain.process import Process
from rltrain.train.replayed import ReplayedRollouts
from rltrain.train.saving import disk_errors
from rltrain.watchdog import Watchdog

__all__ = ["parse_steps", "plan_command", "replay_command"]

# of metrics that the clock, the engine or its weights decide, which a replay does not have
_NOT_COMPARED = ("time/", "sync/", "memory/")
_SHOWN = ("rollout/ess", "rollout/ess_completions", "rollout/ratio_mean", "reward/mean")


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """The first and the last step of "3..9" or "3". Raises UserError."""
    if text is None:
        return None
    first, dots, last = text.partition("..")
    if not first.isdecimal() or (dots and not last.isdecimal()):
        raise UserError(f"--steps {text}: expected two numbers of steps, as in 3..9, or one")
    return int(first), int(last if dots else first)


def plan_command(
    run: Path, steps: tuple[int, int] | None, overrides: Sequence[str], *, check: bool
) -> Replay:
    """What the command is to do. Raises UserError and RecipeError, before a model is loaded."""
    if check and overrides:
        raise UserError("--check compares with the run that was recorded; leave --set out, or --check")
    with user_mistakes():
        replay = plan_replay(run, steps, tuple(overrides))
        workflow_for(replay.recipe)
    return replay


def replay_command(replay: Replay, out: Path | None, *, check: bool) -> int:
    """Returns the exit code: 1 where ``check`` found a difference.

    check: only compare with the run, and keep nothing.
    """
    console = Console(highlight=False, quiet=not is_main_process())
    for line in _describe(replay):
        console.print(line, markup=False, soft_wrap=True)

    with (
        joined_processes(replay.recipe.train.deadline_seconds) as (process, watchdog),
        _output_folder(replay, out, watchdog, keep=not check) as folder,
    ):
        source = _train(replay, folder, process, keep=not check)
        if not process.is_main:
            return 0
        lines = list(_read_steps(folder, replay.steps))
        if replay.is_other_method:
            _report_method(replay, folder, lines, console)
            report_if_possible(folder, QUIET)
            return 0
        if not check:
            report_if_possible(folder, QUIET)
        differences = [*_find_differences(replay, folder, source, lines)]
        return _report_equality(replay, source, differences, console)


def _train(replay: Replay, folder: RunFolder, process: Process, *, keep: bool) -> ReplayedRollouts:
    """Takes the steps in the new ``folder``. Returns what the rollouts came from."""
    if process.is_main:
        RunFolder.create(folder.path, resolved_yaml(replay.recipe), _environment())
    process.meet()
    run = build_replay(replay, folder, process)
    if not keep and not replay.is_whole_run:
        run = dataclasses.replace(run, writer=dataclasses.replace(run.writer, write=lambda path, *_: path))
    try:
        with disk_errors(folder):
            WORKFLOWS[replay.recipe.kind].train(run)
    finally:
        run.writer.close()
        run.close()
    source: Any = run.source
    return source


def _describe(replay: Replay) -> Iterator[str]:
    first = replay.steps[0]
    last = replay.steps[-1]
    start = "the model" if replay.checkpoint is None else replay.checkpoint.name
    yield f"replaying steps {first} to {last} of {replay.folder.path}, from {start}"
    for key, before, now in replay.changes:
        yield f"  {key}: {before} -> {now}"
    yield from (f"warning: {text}" for text in replay.warnings)
    here = describe_environment()
    written = replay.environment
    if any(written.get(key) != here.get(key) for key in ("rltrain", "commit", "python", "packages")):
        yield "note: the journal was written with other software, so results may differ in rounding"


@contextmanager
def _output_folder(
    replay: Replay, out: Path | None, watchdog: Watchdog, *, keep: bool
) -> Iterator[RunFolder]:
    """Where the replay writes: ``out``, or a folder beside the run's; without ``keep`` one that goes."""
    if keep:
        yield RunFolder.from_path(out or replay.folder.path.with_name(f"{replay.folder.path.name}-replay"))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and out is None:
        raise UserError("--check with several ranks needs --run DIR, a folder that they share")
    with tempfile.TemporaryDirectory(prefix="rltrain-replay-", ignore_cleanup_errors=True) as name:
        watchdog.add_cleanup(partial(shutil.rmtree, name, ignore_errors=True))
        yield RunFolder.from_path(out or Path(name) / "run")


def _environment() -> dict[str, Any]:
    return {
        **describe_environment(),
        "run": new_run_id(),
        "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["rltrain", *sys.argv[1:]]),
    }


def _read_steps(folder: RunFolder, steps: range) -> Iterator[dict[str, Any]]:
    """The training steps' lines of metrics.jsonl."""
    for line in _read_lines(folder):
        if line["step"] in steps and "learner/version" in line:
            yield line


def _read_evaluations(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """The evaluations' lines of metrics.jsonl."""
    for line in _read_lines(folder):
        if "eval/reward" in line and "learner/version" not in line:
            yield line


def _read_lines(folder: RunFolder) -> Iterator[dict[str, Any]]:
    if folder.metrics.exists():
        for text in folder.metrics.read_text(encoding="utf-8").splitlines():
            yield json.loads(text)


def _find_differences(
    replay: Replay, folder: RunFolder, source: ReplayedRollouts, lines: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What is not equal, in words, first to last."""
    for step, is_equal in source.comparisons.items():
        if not is_equal:
            yield f"step {step}: the weights before it are others"
    for version, is_equal in source.evaluations.items():
        if not is_equal:
            yield f"the weights that were evaluated after {version} updates are others"
    if replay.is_whole_run:
        hashes = [
            {name: digest for name, digest in file_hashes(path).items() if name.endswith(".safetensors")}
            for path in (replay.folder.model, folder.model)
        ]
        if not hashes[0] or hashes[0] != hashes[1]:
            yield "the finished model has other weights"
    recorded = {line["step"]: line for line in _read_steps(replay.folder, replay.steps)}
    evaluated = {line["step"]: line for line in _read_evaluations(replay.folder)}
    for line in (*lines, *_read_evaluations(folder)):
        expected = (recorded if "learner/version" in line else evaluated).get(line["step"], {})
        for name in line.keys() & expected.keys():
            if not name.startswith(_NOT_COMPARED) and line[name] != expected[name]:
                yield f"step {line['step']}: {name} is {line[name]!r}, and was {expected[name]!r}"


def _report_equality(
    replay: Replay, source: ReplayedRollouts, differences: Sequence[str], console: Console
) -> int:
    first = replay.steps[0]
    last = replay.steps[-1]
    if differences:
        for line in differences[:10]:
            console.print(line, markup=False, soft_wrap=True)
        console.print(f"{len(differences)} differences from the run", markup=False)
        return 1
    count = len(source.evaluations)
    held_out = f", {count} evaluation{'s'[: count > 1]}" if count else ""
    end = ", and the finished model" if replay.is_whole_run else ""
    console.print(
        f"equal to the bit: the weights before each of steps {first} to {last}, its metrics{held_out}{end}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _report_method(
    replay: Replay, folder: RunFolder, lines: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """Prints and writes how far the policy is from the one that sampled, step by step."""
    steps = [{"step": line["step"], **{name: line.get(name) for name in _SHOWN}} for line in lines]
    low = list_low_steps(steps)
    content = {
        "run": replay.folder.run_id,
        "steps": steps,
        "low": low,
        "changes": {key: now for key, _, now in replay.changes},
    }
    write_atomic(folder.path / REPLAY_FILE, json.dumps(content, indent=2) + "\n")
    console.print("  step  ess tokens  ess completions  ratio mean  reward", markup=False)
    for row in steps:
        mark = f"  below {LOW_ESS}: samples of another policy" if row["step"] in low else ""
        numbers = [f"{'none' if row[name] is None else format(row[name], '.3f'):>10}" for name in _SHOWN]
        console.print(f"{row['step']:>6}  {'  '.join(numbers)}{mark}", markup=False, soft_wrap=True)
    console.print(
        f"{len(low)} of {len(steps)} steps have an effective sample size below {LOW_ESS}", markup=False
    )
    console.print(f"run          {folder.path}", markup=False, soft_wrap=True)
