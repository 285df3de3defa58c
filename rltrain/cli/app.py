"""The command line: one thin function per command. Each imports its heavy modules itself."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rltrain.config.capacity.cluster import Backend, Cluster
from rltrain.config.capacity.constants import CARDS, GB, Card
from rltrain.errors import RecipeError, UserError
from rltrain.interrupt import exit_on_ctrl_c

if TYPE_CHECKING:
    from rltrain.config.rules import CheckedRecipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help costs 0.15 s
    pretty_exceptions_enable=False,
    help="Post-trains language models with reinforcement learning. Start with: rltrain plan RECIPE",
)

RecipePath = Annotated[
    Path, typer.Argument(help="Recipe: a YAML file, or the name of a shipped one.", metavar="RECIPE")
]
TINY_MODEL = Path(".cache/tiny-model")
Profile = Annotated[
    str | None,
    typer.Option(
        help="Replaces model, data and sizes: a name from recipes/profiles, or a file.", metavar="NAME"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set one key; VALUE is YAML. May be repeated.", metavar="KEY=VALUE"),
]
Engine = Annotated[str | None, typer.Option(help="Shorthand for --set rollout.engine=NAME.", metavar="NAME")]
Seed = Annotated[int | None, typer.Option(help="Shorthand for --set seed=N.", metavar="N")]
EmInf = Annotated[
    float | None,
    typer.Option(
        "--em-inf",
        help="Sharpen each token's logits until their entropy is below so many nats.",
        metavar="NATS",
    ),
]

Trust = Annotated[
    list[str] | None,
    typer.Option(
        help="Model whose own Python code may run: a folder, or NAME@COMMIT on the Hub. May be repeated.",
        metavar="MODEL",
    ),
]


class Selector(StrEnum):
    implicit_prm = "implicit_prm"
    rm = "rm"
    majority = "majority"
    weighted_majority = "weighted_majority"
    oracle = "oracle"


Select = Annotated[
    list[Selector] | None,
    typer.Option(help="Also measure the accuracy of choosing one of N answers this way. May be repeated."),
]


class Series(StrEnum):
    step = "step"
    cumulative = "cumulative"


class Reduction(StrEnum):
    min = "min"
    last = "last"
    sum = "sum"
    mean = "mean"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TinyTask(StrEnum):
    arithmetic = "arithmetic"
    gsm8k_calculator = "gsm8k_calculator"
    calculator = "calculator"


class Template(StrEnum):
    auto = "auto"
    none = "none"


@app.command()
def train(
    recipe: RecipePath,
    profile: Profile = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; by default runs/ and the recipe's name.", metavar="DIR"),
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
        ),
    ] = "auto",
) -> None:
    """Train a recipe.

    Exit code 3: stopped by SIGTERM or Ctrl-C, with a checkpoint; the same command continues.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    folder = run or Path("runs") / recipe.stem
    if not folder.exists():
        from rltrain.build.local_inputs import require_local_inputs

        require_local_inputs(checked.recipe)
    _say_while_loading("torch, tokenizer and data")
    from rltrain.cli.train import train_command

    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(train_command(checked.recipe, folder, checked.warnings, resume))


@app.command()
def doctor(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    seed: Seed = None,
    steps: Annotated[int, typer.Option(help="Steps to run.", min=2)] = 20,
) -> None:
    """Run a few steps at learning rate 0: do engine, rewards and memory suffice for the recipe?

    Exit code 1 if not.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    from rltrain.cli.doctor import doctor_command

    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(doctor_command(checked.recipe, steps))


@app.command()
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


@app.command()
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan for the GPUs as JSON.")] = False,
) -> None:
    """Print every number that a recipe implies; with --gpus and --gpu-gb, whether it fits them.

    Exit code 1 if it does not fit.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, None))
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


@app.command()
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
    for recipe in recipes:
        _load_checked(recipe, profile, keys)
    from rltrain.cli.compare import compare_command

    raise typer.Exit(compare_command(recipes, seeds, out, profile, keys))


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
    from rltrain.cli.soup import soup_command

    with _trusting_code(trust_remote_code or ()):
        raise typer.Exit(soup_command(models, weights or [], out))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.", metavar="MODEL")],
    recipe: Annotated[
        Path,
        typer.Option(
            help="Recipe that says what to evaluate on; its own model is not read.", metavar="RECIPE"
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
    prm: Annotated[
        str | None,
        typer.Option(
            help="Process reward model that chooses, with --prm-reference and --beta.", metavar="MODEL"
        ),
    ] = None,
    prm_reference: Annotated[
        str, typer.Option(help="Reference of --prm; none: log-probs alone.", metavar="MODEL|none")
    ] = "none",
    beta: Annotated[
        float | None,
        typer.Option(help="Coefficient of its rewards, the one it was trained with.", metavar="BETA"),
    ] = None,
    steps: Annotated[str, typer.Option(help="As for rltrain score.", metavar="HOW")] = "newline",
    series: Annotated[Series | None, typer.Option(help="As for rltrain score.")] = None,
    reduction: Annotated[Reduction | None, typer.Option(help="As for rltrain score.")] = None,
    rm: Annotated[
        str | None, typer.Option(help="Reward model with a scalar head that chooses.", metavar="MODEL")
    ] = None,
    kl_to: Annotated[
        str | None,
        typer.Option(help="Also measure the KL divergence of MODEL from this model.", metavar="MODEL"),
    ] = None,
    trust_remote_code: Trust = None,
) -> None:
    """Measure pass@k and avg@k of a model on a recipe's held-out prompts; with --select, also the
    accuracy of choosing one of N answers.
    """
    checked = _load_checked(recipe, profile, _with_shorthands(overrides, engine, seed))
    trusted_models = (*checked.recipe.model.trust_remote_code, *(trust_remote_code or ()))
    if select or kl_to is not None:
        from rltrain.cli.score import Choosers, select_command

        choosers = Choosers(prm, prm_reference, beta, _aggregate(series, reduction), rm, steps, kl_to)
        names = [selector.value for selector in select or ()]
        with _trusting_code(trusted_models):
            raise typer.Exit(select_command(model, checked.recipe, names, choosers, out, em_inf))
    from rltrain.cli.evaluate import eval_command

    with _trusting_code(trusted_models):
        raise typer.Exit(eval_command(model, checked.recipe, out, em_inf))


@app.command()
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
    steps: Annotated[
        str,
        typer.Option(
            help="Where steps end: newline, given (the column steps), or a regex for the start of a step.",
            metavar="HOW",
        ),
    ] = "newline",
    series: Annotated[
        Series | None, typer.Option(help="What is reduced: the steps' rewards, or the value after each step.")
    ] = None,
    reduction: Annotated[
        Reduction | None, typer.Option(help="How that series is reduced to one score.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The file's column for prompt, completion or steps.", metavar="OURS=ITS"),
    ] = None,
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
    """Process rewards of existing completions: of each token, of each step, and of the completion."""
    from rltrain.build.scorer import ProcessModel
    from rltrain.cli.score import score_command
    from rltrain.config.schema import JudgedData

    judge = ProcessModel(model, reference, beta, _aggregate(series, reduction), cache, tokens_per_micro_batch)
    data = JudgedData(train=str(file), system=system, chat_template=chat_template.value)
    with _trusting_code(trust_remote_code or ()):
        raise typer.Exit(score_command(judge, file, out, steps, _parse_columns(column), data, tokens))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of the model.", metavar="MODEL")],
    prompts: Annotated[list[str], typer.Argument(help="What to complete.", metavar="PROMPT...")],
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 1.0,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt to make room for.", min=1)] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens per completion.", min=1)] = 256,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm or vllm_server.", metavar="NAME")
    ] = "transformers",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal completions.")] = 0,
    source: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="Recipe whose engine, lengths, prompt template and environment to use instead.",
            metavar="RECIPE",
        ),
    ] = None,
    profile: Profile = None,
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
    from rltrain.cli.evaluate import generate_command

    with _trusting_code((*recipe.model.trust_remote_code, *(trust_remote_code or ()))):
        raise typer.Exit(generate_command(recipe, prompts, n, temperature, em_inf))


@app.command()
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


@app.command()
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


@app.command(name="tiny-model")
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
    from rltrain.build import tiny_model as models

    options = {"task": task.value, "data": data, "held_out": held_out}
    try:
        models.make_tiny_model(out, **options, seed=seed, steps=steps, right=right, tied=tied, say=typer.echo)
    except ValueError as error:
        raise UserError(str(error)) from error
    if measure:
        typer.echo(json.dumps(models.measure_folder(out, **options)))


@app.command()
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
) -> None:
    """Serve a recipe's model with vLLM, for rollout.engine vllm_server and rollout.server.url.

    The run's token is read from the environment, RLTRAIN_WORKER_TOKEN, here and where the recipe trains.
    """
    checked = _load_checked(recipe, profile, overrides or [])
    from rltrain.cli.worker import Listening, worker_command

    where = Listening(host, port, socket, url_file, log, tls_key, tls_certificate, tls_clients)
    with _trusting_code(checked.recipe.model.trust_remote_code):
        raise typer.Exit(worker_command(checked.recipe, where))


def main() -> None:
    """Entry point.

    A mistake of the user's is one line on stderr and exit code 2; RLTRAIN_TRACEBACK=1 shows its traceback.
    """
    with exit_on_ctrl_c():
        try:
            app()
        except UserError as error:
            if os.environ.get("RLTRAIN_TRACEBACK") == "1":
                raise
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)  # noqa: T201 (for the terminal)
            raise SystemExit(2) from None


def _load_checked(recipe: Path, profile: str | None, overrides: Sequence[str]) -> CheckedRecipe:
    from rltrain.config.load import load_recipe
    from rltrain.config.rules import check

    return check(load_recipe(recipe, profile=profile, overrides=overrides))


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
