"""The arguments and options that several commands share, and the names that a shell completes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "KEYS",
    "LENGTHS",
    "RUN",
    "SELECTION",
    "Columns",
    "EmInf",
    "Engine",
    "ItsBeta",
    "ItsReduction",
    "ItsReference",
    "ItsSeries",
    "ItsSteps",
    "KlTo",
    "Overrides",
    "Precision",
    "ProcessRewardModel",
    "Profile",
    "RecipePath",
    "Reduction",
    "ReductionOption",
    "RewardModel",
    "Seed",
    "Select",
    "Selector",
    "Series",
    "SeriesOption",
    "Steps",
    "Template",
    "TinyTask",
    "Trust",
    "examples",
]

# titles of the groups that --help puts options in
KEYS = "Options of the recipe"
RUN = "Options of the run"
SELECTION = "Options of --select and --kl-to"
LENGTHS = "Options without --recipe"


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def _complete_recipes(incomplete: str) -> Iterator[tuple[str, str]]:
    """(name, title) of the shipped recipes that begin so; the shell itself completes files."""
    from rltrain.config.shipped import find_recipes

    return ((name, title) for name, _, title in find_recipes() if name.startswith(incomplete))


def _complete_profiles(incomplete: str) -> list[str]:
    from rltrain.config.shipped import RECIPES_FOLDER

    names = sorted(path.stem for path in (RECIPES_FOLDER / "profiles").glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


RecipePath = Annotated[
    Path,
    typer.Argument(
        help="Recipe: a YAML file, or the name of a shipped one.",
        metavar="RECIPE",
        autocompletion=_complete_recipes,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        help="Replaces model, data and sizes: a name from recipes/profiles, or a file.",
        metavar="NAME",
        autocompletion=_complete_profiles,
        rich_help_panel=KEYS,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set one key; VALUE is YAML. May be repeated.",
        metavar="KEY=VALUE",
        rich_help_panel=KEYS,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(help="Shorthand for --set rollout.engine=NAME.", metavar="NAME", rich_help_panel=KEYS),
]
Seed = Annotated[
    int | None, typer.Option(help="Shorthand for --set seed=N.", metavar="N", rich_help_panel=KEYS)
]
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
    typer.Option(
        help="Also measure the accuracy of choosing one of N answers by implicit_prm, rm, majority, "
        "weighted_majority or oracle. May be repeated.",
        metavar="HOW",
        rich_help_panel=SELECTION,
    ),
]


class Series(StrEnum):
    step = "step"
    cumulative = "cumulative"


class Reduction(StrEnum):
    min = "min"
    last = "last"
    sum = "sum"
    mean = "mean"


class TinyTask(StrEnum):
    arithmetic = "arithmetic"
    gsm8k_calculator = "gsm8k_calculator"
    calculator = "calculator"


class PretrainedName(StrEnum):
    smollm2 = "smollm2"


class ModelSource(StrEnum):
    auto = "auto"
    package = "package"
    hub = "hub"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Template(StrEnum):
    auto = "auto"
    none = "none"


# how one of N answers is chosen
ProcessRewardModel = Annotated[
    str | None,
    typer.Option(
        help="Process reward model that chooses, with --prm-reference and --beta.",
        metavar="MODEL",
        rich_help_panel=SELECTION,
    ),
]
ItsReference = Annotated[
    str,
    typer.Option(
        help="Reference of --prm; none: log-probs alone.", metavar="MODEL|none", rich_help_panel=SELECTION
    ),
]
ItsBeta = Annotated[
    float | None,
    typer.Option(
        help="Coefficient of its rewards, the one it was trained with.",
        metavar="BETA",
        rich_help_panel=SELECTION,
    ),
]
ItsSteps = Annotated[
    str, typer.Option(help="As for rltrain score.", metavar="HOW", rich_help_panel=SELECTION)
]
ItsSeries = Annotated[Series | None, typer.Option(help="As for rltrain score.", rich_help_panel=SELECTION)]
ItsReduction = Annotated[
    Reduction | None, typer.Option(help="As for rltrain score.", rich_help_panel=SELECTION)
]
RewardModel = Annotated[
    str | None,
    typer.Option(
        help="Reward model with a scalar head that chooses.", metavar="MODEL", rich_help_panel=SELECTION
    ),
]
KlTo = Annotated[
    str | None,
    typer.Option(
        help="Also measure the KL divergence of MODEL from this model.",
        metavar="MODEL",
        rich_help_panel=SELECTION,
    ),
]

# what rltrain score takes
Steps = Annotated[
    str,
    typer.Option(
        help="Where steps end: newline, given (the column steps), or a regex for the start of a step.",
        metavar="HOW",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(help="The file's column for prompt, completion or steps.", metavar="OURS=ITS"),
]
SeriesOption = Annotated[
    Series | None, typer.Option(help="What is reduced: the steps' rewards, or the value after each step.")
]
ReductionOption = Annotated[Reduction | None, typer.Option(help="How that series is reduced to one score.")]
