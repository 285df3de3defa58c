"""``rltrain train``: checks the inputs, loads weights, then trains; closes every engine and process at
the end.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from rltrain.analysis.pages.summary import read_facts
from rltrain.build.context import RunContext
from rltrain.build.digests import input_digests, with_prompt_date
from rltrain.build.publication import push_run, with_pushes
from rltrain.build.workflows import Workflow, workflow_for
from rltrain.checkpoint.hub import hide_progress_bars, open_repository
from rltrain.checkpoint.inputs import changes
from rltrain.checkpoint.resume import is_finished, open_run, saved_date
from rltrain.checkpoint.run_folder import RunFolder, describe_environment, new_run_id, write_atomic
from rltrain.checkpoint.saved_recipe import AUTO
from rltrain.cli.session import is_main_process, joined_processes, rank_name, user_errors
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.phase_line import describe_phase
from rltrain.config.capacity.shape import read_shape
from rltrain.config.model_config import config_path
from rltrain.config.schema import AnyRecipe
from rltrain.errors import UserError, user_mistakes
from rltrain.interrupt import resuming_command
from rltrain.learner.ranks import agree, backend_name, request_offload
from rltrain.report.progress import list_changes
from rltrain.report.reporter import Reporter
from rltrain.train.loop import TrainingRun
from rltrain.train.profiling import MEMORY_FOLDER, snapshot_on_out_of_memory
from rltrain.train.saving import (
    STOPPED,
    Stopped,
    StopRequest,
    TimeLimit,
    WithoutWorkers,
    disk_errors,
    record_stop_signals,
    stop_with_the_launcher,
)
from rltrain.watchdog import EXPIRED

BANNER = ("method", "paper", "model", "data", "engine", "seed")  # facts of a run that its first lines show


def train_command(recipe: AnyRecipe, folder: Path, warnings: Sequence[str], resume: str = AUTO) -> int:
    """Trains from the checks to the finished model. Returns the exit code: 0, or STOPPED after a SIGTERM or
    a Ctrl-C, or EXPIRED where no worker samples any more.

    resume: "auto" continues the run in ``folder`` if there is one, "never" refuses to; any other value is the
    folder of a checkpoint.
    """
    run_folder = RunFolder.from_path(folder)
    workflow = workflow_for(recipe)
    recipe = with_prompt_date(recipe, saved_date(run_folder, resume))
    if resume == AUTO and is_finished(run_folder, recipe):
        if is_main_process():
            _print_line(f"already finished: {run_folder.model}")
            _push(recipe, run_folder, _print_line)
        return 0
    if is_main_process():
        _require_repository(recipe)

    lines = [f"warning: {warning}" for warning in warnings]
    if recipe.data.date is not None:
        lines.append(f"the date in prompts is {recipe.data.date} for the whole run (data.date)")
    with user_errors(recipe.train.deadline_seconds):
        request_offload(recipe.learner.offload)
        inputs = workflow.load(recipe)
        digests = input_digests(recipe, inputs)

    with workflow.resources(inputs), ExitStack() as stack:
        process, watchdog = stack.enter_context(joined_processes(recipe.train.deadline_seconds))
        checkpoint = None
        if process.is_main:
            with user_mistakes():
                opened = open_run(
                    run_folder,
                    recipe,
                    resume,
                    _describe_start(process.world_size),
                    lambda text: lines.append(f"warning: {text}"),
                    digests,
                )
                checkpoint = stack.enter_context(opened).checkpoint
        with watchdog.waiting("rank 0", "to open the run folder"):
            checkpoint, rank_0_digests = agree((checkpoint, digests))
        require_same_inputs(rank_0_digests, digests)

        stop_request = stack.enter_context(record_stop_signals(limit_time(recipe.train.max_hours)))
        stack.enter_context(stop_with_the_launcher())
        context = RunContext(run_folder, checkpoint, process, stop_request, digests)
        run = with_pushes(workflow.build(recipe, inputs, context), context)
        lines += workflow.summarize(inputs)
        if checkpoint is not None:
            lines.append(f"continuing from {checkpoint}")
        if process.is_main:
            _show_banner(run, run_folder)
        for line in lines:
            run.reporter.message(line)
        return _train(run, workflow, run_folder, stop_request, is_main=process.is_main)


def _describe_start(processes: int) -> dict[str, Any]:
    """The software, and how, when and under which name the run was started. processes: of the learner."""
    return {
        **describe_environment(),
        "processes": processes,
        "run": new_run_id(),
        "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["rltrain", *sys.argv[1:]]),
    }


def _show_banner(run: TrainingRun, folder: RunFolder) -> None:
    """What runs, as the page of the run has it at its top."""
    known = read_facts(folder)
    facts = [(label, value) for label, value in known.facts if label in BANNER]
    steps = str(run.total_steps) if run.resumed is None else f"{run.resumed.step} of {run.total_steps} done"
    run.reporter.banner(known.title, [*facts, ("steps", steps), ("run", str(folder.path))])


def limit_time(hours: float | None) -> TimeLimit | None:
    """hours: from the start of this process."""
    return None if hours is None else TimeLimit(3600 * hours, psutil.Process().create_time())


def _train(
    run: TrainingRun, workflow: Workflow, folder: RunFolder, stop_request: StopRequest, *, is_main: bool
) -> int:
    """Trains and reports. Returns the exit code."""
    try:
        with disk_errors(folder):
            stop_request.in_loop = True
            memory = folder.path / MEMORY_FOLDER
            with snapshot_on_out_of_memory(memory, run.learner.rank, partial(_expected_memory, run)):
                model = workflow.train(run)
            if is_main:
                report_if_possible(folder, run.reporter)
        files = ("metrics", "transcripts", "report") if workflow.samples else ("metrics", "report")
        lines = [f"{name:<11}  {getattr(folder, name)}" for name in files if getattr(folder, name).exists()]
        lines = [*list_changes(run.history.all), f"model        {model}", *lines, *_next_commands(folder)]
        run.reporter.message("\n".join(lines))
        if is_main:
            if run.writer.pushes is not None:
                run.writer.pushes.wait()
            _push(run.recipe, folder, run.reporter.message)
    except Stopped as stopped:
        if is_main:
            report_if_possible(folder, run.reporter)
        run.reporter.message(
            f"stopped by {stop_request.cause} after step {stopped.step}: {stopped.checkpoint}"
        )
        run.reporter.message(f"continue with: {resuming_command(sys.argv)}")
        return STOPPED
    except WithoutWorkers as ended:
        if is_main:
            report_if_possible(folder, run.reporter)
        run.reporter.message(str(ended))
        run.reporter.message(f"continue with: {resuming_command(sys.argv)}")
        return EXPIRED
    finally:
        run.writer.close()
        run.close()
    return 0


def _next_commands(folder: RunFolder) -> list[str]:
    path = shlex.quote(str(folder.path))
    return [
        f"next         rltrain report {path}",
        f"             rltrain generate {path}/model PROMPT",
        f"             rltrain push {path} OWNER/MODEL",
    ]


def _require_repository(recipe: AnyRecipe) -> None:
    """Raises HubError where the model at the end could not be pushed: before anything is loaded."""
    if recipe.push is not None:
        hide_progress_bars()
        open_repository(recipe.push.repo, private=recipe.push.private, report=_print_line)


def _push(recipe: AnyRecipe, folder: RunFolder, report: Callable[[str], None]) -> None:
    if recipe.push is not None:
        push_run(recipe.push, folder, report)


def _print_line(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _expected_memory(run: TrainingRun, phase: str | None) -> str:
    """The plan's line for a phase on the machine at hand; on a CPU, of its whole memory."""
    trained = run.learner.trained
    on_gpu = trained.device.type == "cuda"
    size = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    cluster = Cluster(trained.world_size, size, Backend(backend_name(trained.accelerator)))
    return describe_phase(
        run.recipe, lambda path, revision: read_shape(config_path(path, revision)), cluster, phase
    )


def require_same_inputs(rank_0_digests: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Raises UserError if this rank reads other code, data or models than rank 0, for example on a node
    with older files.
    """
    lines = list(changes(rank_0_digests, digests))
    if lines:
        raise UserError(
            "\n".join([f"{rank_name()} reads something else than rank 0 (rank 0 -> here):", *lines])
        )


def write_report(folder: RunFolder) -> None:
    """Writes report.html: the run's measurements, curves and completions, in one self-contained file."""
    from rltrain.analysis.pages.run_page import run_page

    write_atomic(folder.report, run_page(folder))


def report_if_possible(folder: RunFolder, reporter: Reporter) -> None:
    """Writes the report of a run that ended. A failure is only a warning: model or checkpoint are saved."""
    try:
        write_report(folder)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        reporter.warn(f"{folder.report} is not written: {error}")
