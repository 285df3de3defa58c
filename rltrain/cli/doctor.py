"""``rltrain doctor``: the recipe's training loop at learning rate 0, in a folder that is removed
afterwards, even if the run fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rltrain.build.context import RunContext
from rltrain.build.digests import with_prompt_date
from rltrain.build.inputs import RunInputs
from rltrain.build.local_inputs import require_sampled
from rltrain.build.workflows import Workflow, workflow_for
from rltrain.checkpoint.run_folder import RunFolder, describe_environment
from rltrain.cli.session import joined_processes, user_errors
from rltrain.config.load import resolved_yaml
from rltrain.config.schema import AnyRecipe, SampledRecipe
from rltrain.train.doctor import (
    EXPECTED,
    START,
    STEPS,
    Finding,
    diagnose,
    diagnose_error,
    freeze_recipe,
)
from rltrain.train.machines import RankFacts, machine_findings
from rltrain.train.memory import GpuWatch, largest_share, peak_memory
from rltrain.watchdog import Watchdog

# errors of engine, model or grader
_FAULTS = (
    RuntimeError,
    ValueError,
    OSError,
    MemoryError,
    ImportError,
    AssertionError,
    LookupError,
    TypeError,
)
_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler takes it for an ordinary error."""


def doctor_command(recipe: AnyRecipe, steps: int) -> int:
    """``rltrain doctor``: ``steps`` steps at learning rate 0; the exit code is 1 if a finding is bad or
    was not reached.
    """
    sampled = require_sampled(
        recipe,
        "rltrain doctor tries out an engine and rewards, and this recipe has neither: it learns from judged "
        "completions",
    )
    workflow = workflow_for(recipe)
    sampled = workflow.with_every_row_trained(freeze_recipe(with_prompt_date(sampled), steps))
    with unwinding_on_sigterm():
        with user_errors(recipe.train.deadline_seconds):
            inputs = workflow.load(sampled)
        findings = run_doctor(sampled, workflow, inputs)

    console = Console(highlight=False)
    for finding in findings:
        line = f"{_MARKS[finding.is_fine]}  {finding.question:<39}  {finding.measured}"
        console.print(line, markup=False, soft_wrap=True)
    return 0 if all(finding.is_fine for finding in findings) else 1


def run_doctor(recipe: SampledRecipe, workflow: Workflow, inputs: RunInputs) -> list[Finding]:
    """The findings, on rank 0; on another rank only the error that ended it, if there was one."""
    stage = START
    try:
        with (
            workflow.resources(inputs),
            joined_processes(recipe.train.deadline_seconds) as (process, watchdog),
            temporary_folder(watchdog) as path,
        ):
            folder = RunFolder.create(path / "run", resolved_yaml(recipe), describe_environment())
            run: Any = workflow.build(recipe, inputs, RunContext(folder, process=process))
            stage = STEPS
            try:
                discard = dataclasses.replace(run.writer, write=lambda out, *_: out)
                with GpuWatch() as gpu:
                    workflow.train(dataclasses.replace(run, writer=discard))
                lines = folder.metrics.read_text(encoding="utf-8").splitlines() if process.is_main else []
                software = describe_environment()["packages"] | {"precision": recipe.learner.precision}
                facts = RankFacts(process.rank, platform.node(), {k: str(v) for k, v in software.items()})
                ranks = process.gather([facts])
                memories = largest_share(process.gather([(platform.node(), peak_memory(gpu))]))
                if not process.is_main:
                    return []
                steps = [json.loads(line) for line in lines]
                machines = machine_findings(ranks, run.sync.targets[0])
                return machines + diagnose(recipe, steps, run.mismatch, memories, judged=workflow.uses_judge)
            finally:
                run.close()
    except _FAULTS as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        return diagnose_error(error, stage, judged=workflow.uses_judge)


@contextlib.contextmanager
def temporary_folder(watchdog: Watchdog) -> Iterator[Path]:
    """A folder that is removed at the end of the block, and when a deadline ends the process."""
    with tempfile.TemporaryDirectory(prefix="rltrain-doctor-", ignore_cleanup_errors=True) as name:
        watchdog.add_cleanup(partial(shutil.rmtree, name, ignore_errors=True))
        yield Path(name)


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """A context in which the first SIGTERM closes open resources before it ends the process; a second one
    ends it immediately.

    Outside the main thread Python allows no signal handler.
    """

    def unwind(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
