"""What the command line runs: checks first, then weights, then the work, and every engine and process closed at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console

from rltrain.build import (
    Language,
    build_engine,
    build_evaluator,
    build_run,
    describe,
    load_from_disk,
    load_language,
    prepare,
    user_mistakes,
)
from rltrain.checkpoint.resume import AUTO, is_finished, opened
from rltrain.checkpoint.run_folder import RunFolder, describe_environment, write_atomic
from rltrain.config.load import resolved_yaml
from rltrain.config.schema import Model, Recipe
from rltrain.data.chat import render
from rltrain.errors import UserError
from rltrain.learner.accelerate_learner import agree
from rltrain.protocols import RolloutEngine
from rltrain.sync.fingerprint import WeightMismatchError
from rltrain.train.doctor import Finding, Memory, at_rest, diagnose
from rltrain.train.evaluate import Evaluation
from rltrain.train.online import train
from rltrain.train.saving import STOPPED, Stopped, disk_errors, sigterm_noted
from rltrain.types import Prompt, Sampling


def train_command(recipe: Recipe, folder: Path, warnings: Sequence[str], resume: str = AUTO) -> int:
    """``rltrain train``: everything from the checks to the finished model. The exit code: 0, or STOPPED after a SIGTERM.

    resume: "auto" continues the run in ``folder`` where there is one, "never" refuses it, anything else is a checkpoint's folder.
    """
    main, run_folder = int(os.environ.get("RANK", "0")) == 0, RunFolder.at(folder)
    console = Console(highlight=False)
    if resume == AUTO and is_finished(run_folder, recipe):
        if main:
            console.print(f"already finished: {run_folder.model}", markup=False, soft_wrap=True)
        return 0
    notes = [f"warning: {warning}" for warning in warnings]
    with user_mistakes():
        materials = prepare(recipe)
    with materials.grader, ExitStack() as stack:
        environment, checkpoint = describe_environment(), None
        if main:
            with user_mistakes():
                warn = partial(_append_warning, notes)
                checkpoint = stack.enter_context(opened(run_folder, recipe, resume, environment, warn)).checkpoint
        checkpoint = agree(checkpoint)
        noted = stack.enter_context(sigterm_noted())
        run = build_run(recipe, materials, run_folder, main, checkpoint, noted)
        for line in (*notes, *describe(materials), *([f"continuing from {checkpoint}"] if checkpoint else [])):
            run.reporter.message(line)
        try:
            with disk_errors(run_folder):
                model = train(run)
            run.reporter.message(f"model        {model}\nmetrics      {run_folder.metrics}\ntranscripts  {run_folder.transcripts}")
        except Stopped as stopped:
            run.reporter.message(str(stopped))
            return STOPPED
        finally:
            run.engine.close()
            run.reporter.close()
    return 0


def _append_warning(notes: list[str], text: str) -> None:
    notes.append(f"warning: {text}")


def doctor_command(recipe: Recipe, steps: int) -> int:
    """``rltrain doctor``: ``steps`` steps at learning rate 0 in a folder that is removed again; 1 if a verdict is bad."""
    recipe, main = at_rest(recipe, steps), int(os.environ.get("RANK", "0")) == 0
    with user_mistakes():
        materials = prepare(recipe)
    with materials.grader, tempfile.TemporaryDirectory(prefix="rltrain-doctor-") as temporary:
        folder = RunFolder.create(Path(temporary) / "run", resolved_yaml(recipe), describe_environment())
        run = build_run(recipe, materials, folder, main, None, lambda: False)
        try:
            train(dataclasses.replace(run, writer=dataclasses.replace(run.writer, write=lambda out, *_: out)))  # the model is the old one
            found = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()] if main else []
            findings = diagnose(recipe, found, run.mismatch, peak_memory()) if main else []
        except (WeightMismatchError, torch.OutOfMemoryError) as error:
            question = "the engine holds the learner's weights" if isinstance(error, WeightMismatchError) else "GPU memory suffices"
            findings = [Finding(question, False, str(error))]
        finally:
            run.engine.close()
            run.reporter.close()
    console = Console(highlight=False)
    for one in findings:
        console.print(f"{'ok  ' if one.fine else 'FAIL'}  {one.question:<39}  {one.measured}", markup=False, soft_wrap=True)
    return 0 if all(one.fine for one in findings) else 1


def peak_memory() -> list[Memory]:
    """Of this process so far, and of the GPU if there is one."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = [Memory("memory", own, psutil.virtual_memory().total)]
    if torch.cuda.is_available():
        found.append(Memory("GPU memory", torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]))
    return found


def eval_command(model: str, recipe: Recipe, out: Path | None) -> int:
    """``rltrain eval``: unbiased pass@k of ``model`` on the recipe's held-out prompts, printed and, as JSON, written to ``out``."""
    recipe = recipe.model_copy(update={"model": Model(path=model)})
    with user_mistakes():
        materials = prepare(recipe)
    with materials.grader:
        if materials.held_out is None:
            raise UserError("the recipe names no held-out prompts; set data.eval")
        with _engine_with(recipe, materials.language) as engine:
            result = build_evaluator(recipe, materials).evaluate(engine, version=0)
    show(result, Console())
    if out is not None:
        write_atomic(out, json.dumps({"model": model, **result.metrics()}, indent=2) + "\n")
    return 0


def generate_command(recipe: Recipe, prompts: Sequence[str], n: int, temperature: float) -> int:
    """``rltrain generate``: ``n`` completions of each prompt, printed. The recipe carries model, engine, lengths and seed."""
    with user_mistakes():
        language = load_language(recipe)
        rendered = [_rendered(str(number), text, language) for number, text in enumerate(prompts)]
    sampling = Sampling(n=n, temperature=temperature, max_tokens=recipe.rollout.max_tokens, seed=recipe.seed)
    with _engine_with(recipe, language) as engine:
        groups = engine.generate(rendered, sampling, version=0)
    console = Console(highlight=False)
    for text, group in zip(prompts, groups, strict=True):
        console.print(text, style="bold", markup=False)
        for completion in group.completions:
            console.print(f"  {completion.text}", markup=False)
    return 0


def show(result: Evaluation, console: Console) -> None:
    """Results with their intervals, one per line."""
    named = [(f"pass@{one.k}", one) for one in result.results] + [(f"avg@{result.n}", result.average)]
    for name, one in named:
        console.print(f"{name:<8} {one.value:.3f}  [{one.low:.3f}, {one.high:.3f}]", markup=False)
    ungraded = f", {result.ungraded} ungraded" if result.ungraded else ""
    console.print(f"reward   {result.reward:.3f}  over {len(result.groups)} prompts{ungraded}", markup=False)


def _rendered(name: str, text: str, language: Language) -> Prompt:
    spelt, token_ids = render(text, language.tokenizer, system=None, chat_template="auto")
    return Prompt(name, tuple(token_ids), spelt)


@contextmanager
def _engine_with(recipe: Recipe, language: Language) -> Iterator[RolloutEngine]:
    """The recipe's engine holding the recipe's model."""
    engine = build_engine(recipe, language, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        load_from_disk(engine, recipe.model)
        yield engine
    finally:
        engine.close()
