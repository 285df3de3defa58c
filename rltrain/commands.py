"""What the command line runs: checks first, then weights, then the work, and every engine and process closed at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
from rltrain.checkpoint.run_folder import RunFolder, describe_environment, write_atomic
from rltrain.config.load import resolved_yaml
from rltrain.config.schema import Model, Recipe
from rltrain.data.chat import render
from rltrain.errors import UserError
from rltrain.protocols import RolloutEngine
from rltrain.train.evaluate import Evaluation
from rltrain.train.online import train
from rltrain.types import Prompt, Sampling


def train_command(recipe: Recipe, folder: Path, warnings: Sequence[str]) -> int:
    """``rltrain train``: everything from the checks to the finished model."""
    main = int(os.environ.get("RANK", "0")) == 0
    with user_mistakes():
        materials = prepare(recipe)
    with materials.grader:
        run_folder = RunFolder.create(folder, resolved_yaml(recipe), describe_environment()) if main else RunFolder(folder)
        run = build_run(recipe, materials, run_folder, main)
        for line in (*(f"warning: {warning}" for warning in warnings), *describe(materials)):
            run.reporter.message(line)
        try:
            model = train(run)
            run.reporter.message(f"model        {model}\nmetrics      {run_folder.metrics}\ntranscripts  {run_folder.transcripts}")
        finally:
            run.reporter.close()
            run.engine.close()
    return 0


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
