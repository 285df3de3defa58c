"""What the command line runs: checks first, then weights, then the work, and every engine and process closed at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rltrain.build import build_run
from rltrain.build_inputs import common_date, dated, inputs_of
from rltrain.build_materials import describe, prepare
from rltrain.build_offline import build_offline_run, describe_offline, evaluate_offline, prepare_offline
from rltrain.build_pairs import build_pair_run
from rltrain.build_rollout import build_engine, build_evaluator, graded_by_models, load_from_disk
from rltrain.checkpoint.export import export_model
from rltrain.checkpoint.inputs import changes
from rltrain.checkpoint.resume import AUTO, is_finished, opened, saved_date
from rltrain.checkpoint.run_folder import RunFolder, describe_environment, new_run_id, write_atomic
from rltrain.checkpoint.soup import soup
from rltrain.config.check_pairs import sampling_recipe
from rltrain.config.load import load_recipe
from rltrain.config.schema import AnyRecipe, Model, OfflineRecipe, PairRecipe, Recipe
from rltrain.data.chat import render
from rltrain.data.language import Language, language_of, load_language
from rltrain.errors import UserError, user_mistakes
from rltrain.interrupt import resuming_command
from rltrain.learner.accelerate_learner import load_causal_lm
from rltrain.learner.frozen import require_same_tokens
from rltrain.learner.ranks import agree, board, connect, mixed_precision
from rltrain.protocols import RolloutEngine
from rltrain.report.reporter import Reporter
from rltrain.rollout.watched import WatchedEngine
from rltrain.round_trip import Losses
from rltrain.train.evaluate import Evaluation
from rltrain.train.offline import train_offline
from rltrain.train.online import Run, train
from rltrain.train.online_pairs import PairRun, train_pairs
from rltrain.train.saving import STOPPED, Stopped, disk_errors, stop_with_the_launcher, stops_noted
from rltrain.types import Prompt, Sampling
from rltrain.watchdog import Waiting, Watchdog


@dataclass(frozen=True)
class Work:
    """A recipe's materials, and what is done with them, whatever its kind."""

    held: AbstractContextManager[object]  # what must be given back at the end
    build: Callable[..., Any]  # (folder, main, checkpoint, stop, waiting, inputs) -> a run with a reporter
    inputs: Callable[[], dict[str, str]]  # digests of code, data and models that the recipe names
    describe: Callable[[], Iterator[str]]
    train: Callable[[Any], Path]
    close: Callable[[Any], None]
    files: Sequence[str]  # of the run folder, to be named at the end


def work_of(recipe: AnyRecipe) -> Work:
    """Loads and checks the recipe's materials. Raises ValueError or OSError on what a user can mend."""
    mixed_precision(recipe.learner.precision)
    if isinstance(recipe, OfflineRecipe):
        judged = prepare_offline(recipe)
        build_judged, lines = partial(build_offline_run, recipe, judged), partial(describe_offline, judged)
        inputs, files = partial(inputs_of, recipe, judged), ("metrics", "report")
        return Work(nullcontext(), build_judged, inputs, lines, train_offline, lambda run: run.reporter.close(), files)
    materials = prepare(sampling_of(recipe))

    def close(run: Run | PairRun) -> None:
        run.engine.close()
        run.reporter.close()

    lines, files = partial(describe, materials), ("metrics", "transcripts", "report")
    inputs = partial(inputs_of, recipe, materials)
    if isinstance(recipe, PairRecipe):
        build_pairs = partial(build_pair_run, recipe, materials)
        return Work(materials.grader, build_pairs, inputs, lines, train_pairs, close, files)
    return Work(materials.grader, partial(build_run, recipe, materials), inputs, lines, train, close, files)


def sampling_of(recipe: Recipe | PairRecipe) -> Recipe:
    """What of a recipe says how to sample, grade and evaluate."""
    return sampling_recipe(recipe) if isinstance(recipe, PairRecipe) else recipe


def train_command(recipe: AnyRecipe, folder: Path, warnings: Sequence[str], resume: str = AUTO) -> int:
    """``rltrain train``: everything from the checks to the finished model. The exit code: 0, or STOPPED after a SIGTERM or a Ctrl-C.

    resume: "auto" continues the run in ``folder`` where there is one, "never" refuses it, anything else is a checkpoint's folder.
    """
    main, run_folder = int(os.environ.get("RANK", "0")) == 0, RunFolder.at(folder)
    recipe = dated(recipe, saved_date(run_folder, resume))
    console = Console(highlight=False)
    if resume == AUTO and is_finished(run_folder, recipe):
        if main:
            console.print(f"already finished: {run_folder.model}", markup=False, soft_wrap=True)
        return 0
    notes = [f"warning: {warning}" for warning in warnings]
    if recipe.data.date is not None:
        notes.append(f"the date in prompts is {recipe.data.date} for the whole run (data.date)")
    with preparing(recipe):
        work = work_of(recipe)
        inputs = work.inputs()
    with work.held, ExitStack() as stack:
        watchdog = stack.enter_context(watched(recipe))
        environment, checkpoint = {**describe_environment(), "run": new_run_id()}, None
        if main:
            with user_mistakes():
                warn = partial(_append_warning, notes)
                checkpoint = stack.enter_context(opened(run_folder, recipe, resume, environment, warn, inputs)).checkpoint
        with watchdog.waiting("rank 0", "to open the run folder"):
            checkpoint, of_rank_0 = agree((checkpoint, inputs))
        require_same_inputs(of_rank_0, inputs)
        noted = stack.enter_context(stops_noted())
        stop_with_the_launcher()
        run = work.build(run_folder, main, checkpoint, noted, watchdog.waiting, inputs)
        for line in (*notes, *work.describe(), *([f"continuing from {checkpoint}"] if checkpoint else [])):
            run.reporter.message(line)
        try:
            with disk_errors(run_folder):
                noted.in_loop = True
                model = work.train(run)
                if main:
                    write_report(run_folder)
            named = [f"{name:<11}  {getattr(run_folder, name)}" for name in work.files]
            run.reporter.message("\n".join([f"model        {model}", *named]))
        except Stopped as stopped:
            if main:
                report_if_possible(run_folder, run.reporter)
            run.reporter.message(f"stopped by {noted.by} after step {stopped.step}: {stopped.checkpoint}")
            run.reporter.message(f"continue with: {resuming_command(sys.argv)}")
            return STOPPED
        finally:
            work.close(run)
    return 0


def require_same_inputs(of_rank_0: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raises UserError where this rank reads other code, data or models than rank 0, as on a node with older files."""
    if lines := changes(of_rank_0, own):
        raise UserError("\n".join([f"{_who()} reads something else than rank 0 (rank 0 -> here):", *lines]))


def write_report(folder: RunFolder) -> None:
    """report.html: the run's curves and what it measured, in one file that loads nothing."""
    from rltrain.report.comparison import run_page
    from rltrain.report.curves import Curves

    write_atomic(folder.report, run_page(folder.path.name, Curves.read(folder.path)))


def report_if_possible(folder: RunFolder, reporter: Reporter) -> None:
    """The report of a run that was stopped. Its checkpoint is whole and its exit code says so, whatever becomes of a page."""
    try:
        write_report(folder)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        reporter.warn(f"{folder.report} is not written: {error}")


def _append_warning(notes: list[str], text: str) -> None:
    notes.append(f"warning: {text}")


@contextmanager
def preparing(recipe: AnyRecipe) -> Iterator[None]:
    """Before this process joins others: what the user must mend is one line, and rewards that never come end it like any other wait."""
    with Watchdog(recipe.train.deadline_seconds, _who()), user_mistakes():
        yield


def watched(recipe: AnyRecipe) -> Watchdog:
    """Joins the other ranks, if there are any. Inside the watchdog's block every wait has the recipe's deadline."""
    connect(recipe.train.deadline_seconds)
    return Watchdog(recipe.train.deadline_seconds, _who(), board())


def _who() -> str:
    return f"rank {os.environ.get('RANK', '0')}"


def eval_command(model: str, recipe: AnyRecipe, out: Path | None, em_inf: float | None = None) -> int:
    """``rltrain eval``: unbiased pass@k of ``model`` on the recipe's held-out prompts, printed and, as JSON, written to ``out``.

    em_inf: nats below which EM-INF brings the entropy of each token's logits before one is drawn; None: logits as they are.
    Of a recipe that learns from judged completions: accuracy and margin on the held-out ones, against the recipe's own model.
    """
    if isinstance(recipe, OfflineRecipe):
        recipe = dated(recipe)
        with watched(recipe) as watchdog, user_mistakes():
            judged = evaluate_offline(model, recipe, watchdog.waiting)
        show_numbers(judged.metrics(), Console())
        if out is not None:
            write_atomic(out, json.dumps({"model": model, **judged.metrics()}, indent=2) + "\n")
        return 0
    _, result = measured(model, sampling_of(recipe), em_inf)
    show(result, Console())
    if out is not None:
        write_atomic(out, json.dumps({"model": model, **result.metrics()}, indent=2) + "\n")
    return 0


def measured(model: str, recipe: Recipe, em_inf: float | None = None) -> tuple[Language, Evaluation]:
    """``model`` sampled and graded on the recipe's held-out prompts, and its tokenizer. Raises UserError where there are none."""
    recipe = recipe.model_copy(update={"model": Model(path=model)})
    recipe = dated(recipe)
    with preparing(recipe):
        materials = prepare(recipe)
    with watched(recipe) as watchdog, materials.grader:
        if materials.held_out is None:
            raise UserError("the recipe names no held-out prompts; set data.eval")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        evaluator = build_evaluator(recipe, materials, graded_by_models(recipe, materials.grader, device))
        evaluator = dataclasses.replace(evaluator, sampling=_sharpened(evaluator.sampling, recipe, em_inf))
        with _engine_with(recipe, materials.language, watchdog.waiting) as engine:
            result = evaluator.evaluate(engine, version=0)
    return materials.language, result


def _sharpened(sampling: Sampling, recipe: Recipe, em_inf: float | None) -> Sampling:
    """Raises UserError where EM-INF cannot be had."""
    if em_inf is not None and (em_inf <= 0 or recipe.rollout.engine != "transformers"):
        raise UserError(f"--em-inf {em_inf:g} with engine {recipe.rollout.engine}: it takes a positive number and the engine transformers")
    return dataclasses.replace(sampling, sharpen_below=em_inf)


def generate_command(recipe: AnyRecipe, prompts: Sequence[str], n: int, temperature: float, em_inf: float | None = None) -> int:
    """``rltrain generate``: ``n`` completions of each prompt, printed. The recipe carries model, engine, lengths and seed.

    em_inf: as for ``eval_command``.
    """
    if isinstance(recipe, OfflineRecipe):
        raise UserError(
            "rltrain generate takes engine and lengths from a recipe, and this one learns from judged completions: drop --recipe"
        )
    recipe = dated(sampling_of(recipe))
    with user_mistakes():
        language = load_language(recipe)
        rendered = [_rendered(str(number), text, recipe, language) for number, text in enumerate(prompts)]
    sampling = Sampling(n=n, temperature=temperature, max_tokens=recipe.rollout.max_tokens, seed=recipe.seed)
    sampling = _sharpened(sampling, recipe, em_inf)
    with watched(recipe) as watchdog, _engine_with(recipe, language, watchdog.waiting) as engine:
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
    if result.note:
        console.print(result.note, markup=False, soft_wrap=True)
    ungraded = f", {result.ungraded} ungraded" if result.ungraded else ""
    console.print(f"reward   {result.reward:.3f}  over {len(result.groups)} prompts{ungraded}", markup=False)


def show_numbers(metrics: Mapping[str, float], console: Console) -> None:
    """``accuracy 0.612 [0.571, 0.653]`` and the like, one per line."""
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        bounds = [metrics[key] for key in (f"{name}_low", f"{name}_high") if key in metrics]
        interval = f"  [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
        console.print(f"{name.removeprefix('eval/'):<16} {value:.3f}{interval}", markup=False)


def _rendered(name: str, text: str, recipe: Recipe, language: Language) -> Prompt:
    data = recipe.data
    content = data.prompt_template.format_map({"prompt": text})
    spelt, token_ids = render(content, language.tokenizer, system=data.system, chat_template=data.chat_template, date=data.date)
    losses = Losses()
    losses.add(spelt, token_ids, language.tokenizer)
    losses.check(f"prompt {name}", language.tokenizer)
    language.require_embedded([(f"prompt {name}", token_ids)])
    return Prompt(name, tuple(token_ids), spelt)


@contextmanager
def _engine_with(recipe: Recipe, language: Language, waiting: Waiting) -> Iterator[RolloutEngine]:
    """The recipe's engine holding the recipe's model, proved once it has loaded it and once it has sampled; it cannot keep anybody
    waiting for ever. Raises WeightMismatchError."""
    with waiting(f"the {recipe.rollout.engine} engine", "to start"):
        started = build_engine(recipe, language, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    engine = WatchedEngine(started, recipe.rollout.engine, waiting)
    try:
        sync = load_from_disk(engine, recipe)
        yield engine
        sync.verify(every=True)
    finally:
        engine.close()


def compare_command(recipes: Sequence[Path], seeds: int, out: Path, profile: str | None, overrides: Sequence[str]) -> int:
    """``rltrain compare``: runs that are not finished yet, one after the other; then the table, printed and in ``out``."""
    from rltrain.report.comparison import markdown, write
    from rltrain.train.compare import conditions, gathered, planned, run_all

    console = Console(highlight=False)
    notes = conditions(recipes, profile, overrides)
    date = common_date([load_recipe(path, profile=profile, overrides=overrides) for path in recipes], out)
    overrides = [*overrides, *([] if date is None else [f"data.date={date}"])]
    plan = planned(recipes, seeds, out, profile, overrides)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    run_all(plan, lambda line: console.print(line, markup=False, soft_wrap=True))
    names = ", ".join(path.stem for path in recipes)
    comparison = gathered(f"{names}: {seeds} seeds each", [*filter(None, [profile and f"profile {profile}"]), *overrides, *notes], plan)
    console.print(markdown(comparison), markup=False, soft_wrap=True)
    for path in write(comparison, out):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def report_command(runs: Sequence[str], out: Path) -> int:
    """``rltrain report``: the same table, figure and page of runs named on the command line."""
    from rltrain.report.comparison import Comparison, markdown, write
    from rltrain.report.curves import Curves

    methods: dict[str, list[Curves]] = {}
    for text in runs:
        name, equals, folders = text.partition("=")
        if not equals:
            name, folders = Path(text).name, text
        methods.setdefault(name, []).extend(Curves.read(Path(folder)) for folder in folders.split(","))
    comparison = Comparison(", ".join(methods), (), methods)
    console = Console(highlight=False)
    console.print(markdown(comparison), markup=False, soft_wrap=True)
    for path in write(comparison, out):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def soup_command(models: Sequence[str], weights: Sequence[float], out: Path) -> int:
    """``rltrain soup``: the weighted mean of ``models`` as a model folder, with the first one's tokenizer. weights empty: equal ones."""
    if len(models) < 2 or (weights and len(weights) != len(models)):
        raise UserError(f"a soup of {len(models)} models and {len(weights)} weights; give two or more, and a --weight for each or none")
    shares = list(weights) or [1 / len(models)] * len(models)
    with user_mistakes():
        language = language_of(Model(path=models[0]), {})
        for number, other in enumerate(models[1:], start=2):
            require_same_tokens(language.tokenizer, models[0], f"model {number}", other)
        loaded = [load_causal_lm(model, None, "auto") for model in models]
        for number, other in enumerate(loaded[1:], start=2):
            if other.all_tied_weights_keys != loaded[0].all_tied_weights_keys:
                raise UserError(f"model {number} and model 1 differ in which weights are tied; a soup is of models fine-tuned from one")
        mixed = soup([dict(model.state_dict()) for model in loaded], shares)
        named = " + ".join(f"{share:g} x `{model}`" for model, share in zip(models, shares, strict=True))
        header = f"---\nlibrary_name: transformers\ntags: [rltrain, soup]\n---\n\n# A soup of {len(models)} models\n\n"
        card = f"{header}Every weight is {named}, parameter by parameter (arXiv:2411.01798).\n"
        export_model(out, loaded[0], language.tokenizer, card, mixed)
    Console(highlight=False).print(str(out), markup=False, soft_wrap=True)
    return 0
