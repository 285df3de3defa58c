"""What ``rltrain doctor`` runs: a recipe's own loop at learning rate 0, in a folder that is gone afterwards, however it ends."""

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
from typing import NoReturn

from rich.console import Console

from rltrain.checkpoint.run_folder import RunFolder, describe_environment
from rltrain.commands import Work, dated, preparing, watched, work_of
from rltrain.config.load import resolved_yaml
from rltrain.config.schema import AnyRecipe, OfflineRecipe, PairRecipe, Recipe
from rltrain.errors import UserError
from rltrain.train.doctor import EXPECTED, START, STEPS, Finding, at_rest, cut_short, diagnose
from rltrain.train.memory import fullest, peak_memory
from rltrain.watchdog import Watchdog

_FAULTS = (RuntimeError, ValueError, OSError, MemoryError, ImportError, AssertionError, LookupError, TypeError)  # of engine, model, grader
_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


class Terminated(BaseException):
    """SIGTERM came. Not an Exception: nothing may take it for an error of its own."""


def doctor_command(recipe: AnyRecipe, steps: int) -> int:
    """``rltrain doctor``: ``steps`` steps at learning rate 0; the exit code is 1 where a verdict is bad or was not reached."""
    if isinstance(recipe, OfflineRecipe):
        raise UserError("rltrain doctor tries out an engine and rewards, and this recipe has neither: it learns from judged completions")
    recipe, main = dated(at_rest(recipe, steps)), int(os.environ.get("RANK", "0")) == 0
    with ended_by_sigterm():
        with preparing(recipe):
            work = work_of(recipe)
        findings = tried(recipe, work, main)
    console = Console(highlight=False)
    for one in findings:
        console.print(f"{_MARKS[one.fine]}  {one.question:<39}  {one.measured}", markup=False, soft_wrap=True)
    return 0 if all(one.fine for one in findings) else 1


def tried(recipe: Recipe | PairRecipe, work: Work, main: bool) -> list[Finding]:
    """The verdict, on rank 0; elsewhere only what ended this rank, if something did."""
    stage = START
    try:
        with work.held, watched(recipe) as watchdog, passing_folder(watchdog) as path:
            folder = RunFolder.create(path / "run", resolved_yaml(recipe), describe_environment())
            run = work.build(folder, main, None, lambda: False, watchdog.waiting)
            stage = STEPS
            try:
                work.train(dataclasses.replace(run, writer=dataclasses.replace(run.writer, write=lambda out, *_: out)))  # the old model
                found = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()] if main else []
                memories = fullest(run.learner.gather_objects([(platform.node(), peak_memory())]))
                return diagnose(recipe, found, run.mismatch, memories) if main else []
            finally:
                work.close(run)
    except _FAULTS as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        return cut_short(recipe, error, stage)


@contextlib.contextmanager
def passing_folder(watchdog: Watchdog) -> Iterator[Path]:
    """A folder that is removed when the block ends, and when a deadline ends the process."""
    with tempfile.TemporaryDirectory(prefix="rltrain-doctor-", ignore_cleanup_errors=True) as name:
        watchdog.before_the_end(partial(shutil.rmtree, name, ignore_errors=True))
        yield Path(name)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, the first SIGTERM closes what is open before the process dies of it; a second one ends it at once.

    Outside the main thread Python allows no handler.
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
