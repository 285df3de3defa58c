r"""Compares methods on SmolLM2-135M-Instruct over several sessions: trains the runs that scripts/results does
not have yet, keeps the curves of each, and writes table and figure of all into docs/studies.

    rltrain get-model smollm2 --out .cache/smollm2
    python scripts/study_smollm2.py {entropy,preferences} [--model .cache/smollm2] [--out runs/smollm2] \
        [--minutes 30]

``entropy``: recipes/studies/smollm2_entropy. ``preferences``: recipes/studies/smollm2_preference, on pairs
that the model itself answers and the reward of the other study grades, drawn anew for each seed. All methods
of a seed run one after the other, so that a study that stops early has pairs. A run that is kept is never
repeated: ``--out`` may be lost between two calls, and its weights are removed once the numbers are kept.
``--minutes`` starts no further run after so long; 0 trains nothing and writes the page alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rltrain.analysis.comparison import Comparison, figure
from rltrain.analysis.curves import ANY, Curves, range_of, student_mean

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "studies"
PAGES = ROOT / "docs" / "studies"
RESULTS = ROOT / "scripts" / "results"
BEGIN = "<!-- table: made by scripts/study_smollm2.py -->"
END = "<!-- end of table -->"
ENDS = 3  # steps at either end of a run over which a number is averaged
STEP_METRICS = (
    *("step", "time/step", "reward/mean", "reward/correct", "learner/entropy_mean", "rollout/length_mean"),
    *("rollout/completions", "loss/clip_low", "loss/clip_high", "loss/accuracy", "loss/total"),
)
EVAL_METRICS = re.compile(
    r"step|eval/(pass@\d+|reward|tokens|accuracy|margin|brier|ece|loss|entropy|sampled_entropy|sampled_tokens)"
)
PEAK = "memory/process_peak"
PAIRS = {
    "rollout.max_tokens": 32,
    "reward.functions": [
        {"name": "last_number"},
        {"name": "length", "max_tokens": 32, "buffer_tokens": 28, "weight": 0.5},
    ],
}
# prompts at most, answers to each, and the other split, which the script that samples takes for held out
SAMPLES = {"train": (300, 4, "test"), "test": (64, 16, "train")}

Run = dict[str, Any]


class Column(NamedTuple):
    """A column of the table. differs: the difference from the first method follows it, paired by seed."""

    title: str
    read: Callable[[Run], float]
    digits: int = 3
    differs: bool = False
    within: tuple[float, float] = ANY


def mean_of_ends(metric: str, end: int) -> Callable[[Run], float]:
    """The mean over the first (end 0) or last (end -1) steps."""

    def read(run: Run) -> float:
        values = [value for value in run["steps"].get(metric, []) if value is not None]
        return statistics.fmean(values[-ENDS:] if end else values[:ENDS]) if values else math.nan

    return read


def evaluation(metric: str, number: int = -1) -> Callable[[Run], float]:
    """A held-out metric of this evaluation, NaN where the method has none."""

    def read(run: Run) -> float:
        values = run["evals"].get(metric, [])
        return math.nan if not values or values[number] is None else values[number]

    return read


def clip_share(run: Run) -> float:
    return sum(
        statistics.fmean(value or 0.0 for value in run["steps"][metric])
        for metric in ("loss/clip_low", "loss/clip_high")
        if metric in run["steps"]
    )


def share(title: str, metric: str, digits: int = 3, differs: bool = False) -> Column:
    return Column(title, evaluation(metric), digits, differs, range_of(metric))


SECONDS = Column("seconds of a step, median", lambda run: statistics.median(run["steps"]["time/step"]), 1)
MEMORY = Column("peak memory, GiB", lambda run: run["peak_gib"], 1)


class Study(NamedTuple):
    """methods: names of recipes in ``folder``; the others are compared with the first."""

    name: str
    folder: str
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    has_pairs: bool = False

    @property
    def results(self) -> Path:
        return RESULTS / f"smollm2_{self.name}.json"

    def recipe(self, method: str) -> Path:
        return RECIPES / self.folder / f"{method}.yaml"


STUDIES = {
    "entropy": Study(
        "entropy",
        "smollm2_entropy",
        ("grpo", "dapo", "clip_cov", "kl_cov", "steer", "aepo", "ce_gppo", "hapo", "entropy_bonus"),
        (
            Column("entropy, first steps", mean_of_ends("learner/entropy_mean", 0), 2),
            Column("last steps, nats", mean_of_ends("learner/entropy_mean", -1), 3, differs=True),
            share("held-out pass@1", "eval/pass@1", differs=True),
            share("pass@8", "eval/pass@8", differs=True),
            Column("reward, last steps", mean_of_ends("reward/mean", -1)),
            Column("tokens clipped", clip_share, 4),
            SECONDS,
            MEMORY,
        ),
    ),
    "preferences": Study(
        "preferences",
        "smollm2_preference",
        ("dpo", "h_dpo_0.8", "h_dpo_1.2", "kto", "mmpo"),
        (
            Column("accuracy, untrained", evaluation("eval/accuracy", 0), 3, within=(0.0, 1.0)),
            share("held-out accuracy", "eval/accuracy", differs=True),
            share("Brier", "eval/brier", differs=True),
            share("ECE", "eval/ece", differs=True),
            Column("entropy of own answers, nats", evaluation("eval/sampled_entropy"), 2, differs=True),
            Column("their tokens", evaluation("eval/sampled_tokens"), 1),
            SECONDS,
            MEMORY,
        ),
        has_pairs=True,
    ),
}


def pending_runs(study: Study, runs: Sequence[Run], seeds: int) -> list[tuple[int, str]]:
    """(seed, method) of the runs that are not kept, all methods of a seed together."""
    finished = {(run["seed"], run["method"]) for run in runs}
    pairs = [(seed, method) for seed in range(seeds) for method in study.methods]
    return [pair for pair in pairs if pair not in finished]


def digest_of_recipe(path: Path) -> str:
    """Of what the recipe and its base say, without what they expect."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = yaml.safe_load((path.parent / recipe["extends"]).read_text(encoding="utf-8"))
    recipe.pop("about")
    return digest(json.dumps([base, recipe], sort_keys=True).encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def require_same_conditions(study: Study, runs: Sequence[Run], seed: int, data: str | None) -> None:
    """Ends the program where kept runs are of other recipes than those here, or of other pairs."""
    for run in runs:
        name = f"{run['method']}, seed {run['seed']}, in {study.results.name}"
        if run["recipe"] != digest_of_recipe(study.recipe(run["method"])):
            sys.exit(f"{name} is of another recipe than {study.folder} has now; remove its line")
        if data is not None and run["seed"] == seed and run["data"] != data:
            sys.exit(f"{name} learned from other pairs ({run['data']}, now {data}); remove that seed's lines")


def make_pairs(folder: Path, model: Path, seed: int) -> list[str]:
    """Samples the pairs of one seed, unless they are there; returns the settings that name them."""
    for split, (prompts, n, other) in SAMPLES.items():
        path = folder / f"{split}.jsonl"
        if path.is_file():
            continue
        command = [sys.executable, str(ROOT / "scripts" / "make_samples.py"), str(model)]
        command += ["--recipe", str(STUDIES["entropy"].recipe("grpo")), "--as", "graded_pairs"]
        command += ["--out", str(path), "--prompts", str(prompts), "--n", str(n)]
        splits = {"data.train_split": split, "data.eval_split": other}
        run_command([*command, *set_options({"seed": seed, "model.path": str(model), **splits, **PAIRS})])
    return [f"data.{side}={folder / split}.jsonl" for side, split in (("train", "train"), ("eval", "test"))]


def set_options(settings: Mapping[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def run_command(command: Sequence[str]) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        sys.exit(f"this ended with an error; the study goes on where it stopped: {' '.join(command)}")


def read_run(folder: Path) -> Run:
    """The curves of a finished run, by metric."""
    curves = Curves.read(folder)
    names = {name for line in curves.steps for name in line}
    kept = [name for name in sorted(names) if name in STEP_METRICS or name.endswith("_touched")]
    measured = {name for line in curves.evals for name in line if EVAL_METRICS.fullmatch(name)}
    return {
        "peak_gib": round(max(line.get(PEAK, 0.0) for line in curves.steps), 2),
        "steps": {name: [round_number(line.get(name)) for line in curves.steps] for name in kept},
        "evals": {name: [round_number(line.get(name)) for line in curves.evals] for name in sorted(measured)},
    }


def round_number(value: float | None) -> float | int | None:
    """To five digits; None for a number that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def curves_of(run: Run) -> Curves:
    """The curves as ``rltrain compare`` reads them from a run's folder."""

    def lines(columns: Mapping[str, Sequence[float | None]]) -> tuple[dict[str, float], ...]:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return tuple({name: value for name, value in row.items() if value is not None} for row in rows)

    return Curves(lines(run["steps"]), lines(run["evals"]))


def read_kept(path: Path) -> list[Run]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def write_kept(path: Path, runs: Sequence[Run]) -> None:
    """One line for each run."""
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    path.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")


def train(study: Study, seed: int, method: str, arguments: argparse.Namespace) -> None:
    """Trains one run in a process of its own and keeps its numbers."""
    runs = read_kept(study.results)
    folder = arguments.out / study.name / method / f"seed-{seed}"
    settings = [f"model.path={arguments.model}"]
    data = None
    if study.has_pairs:
        pairs = arguments.out / study.name / "pairs" / f"seed-{seed}"
        settings += make_pairs(pairs, arguments.model, seed)
        data = digest(b"".join(path.read_bytes() for path in sorted(pairs.glob("*.jsonl"))))
    require_same_conditions(study, runs, seed, data)
    command = [sys.executable, "-m", "rltrain", "train", str(study.recipe(method))]
    command += ["--seed", str(seed), "--run", str(folder)]
    run_command([*command, *(word for setting in settings for word in ("--set", setting))])
    run: Run = {
        "method": method,
        "seed": seed,
        "recipe": digest_of_recipe(study.recipe(method)),
        "torch": importlib.metadata.version("torch"),
    }
    run |= ({} if data is None else {"data": data}) | read_run(folder)
    order = {name: place for place, name in enumerate(study.methods)}
    runs = sorted([*read_kept(study.results), run], key=lambda item: (item["seed"], order[item["method"]]))
    write_kept(study.results, runs)
    shutil.rmtree(folder / "model")


def format_values(values: Sequence[float], column: Column, within: tuple[float, float]) -> str:
    """Mean, and Student's interval over seeds from two on; "-" where a seed has none."""
    if not values or not all(map(math.isfinite, values)):
        return "-"
    spread = student_mean(values, within)
    numbers = [f"{number:.{column.digits}f}" for number in (spread.value, spread.low, spread.high)]
    return numbers[0] if len(values) == 1 else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def draw_table(study: Study, runs: Sequence[Run]) -> str:
    """A row for each method that has a run. Differences are over the seeds that both methods have."""
    of_method = {
        method: {run["seed"]: run for run in runs if run["method"] == method} for method in study.methods
    }
    first = study.methods[0]
    header = ["method", "seeds"]
    for column in study.columns:
        header += [column.title, *([f"less {first}'s"] if column.differs else [])]
    rows = [header, ["---"] * len(header)]
    for method, by_seed in of_method.items():
        if not by_seed:
            continue
        row = [method, str(len(by_seed))]
        for column in study.columns:
            values = [column.read(run) for run in by_seed.values()]
            row.append(format_values(values, column, column.within))
            if column.differs:
                common = [] if method == first else sorted(set(by_seed) & set(of_method[first]))
                differences = [
                    column.read(by_seed[seed]) - column.read(of_method[first][seed]) for seed in common
                ]
                row.append(format_values(differences, column, ANY))
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_page(study: Study) -> None:
    """The table between the marks of the page, and the figure beside it, of all runs that are kept."""
    runs = read_kept(study.results)
    if not runs:
        return
    page = PAGES / f"smollm2_{study.name}.md"
    text = page.read_text(encoding="utf-8")
    head = text.partition(BEGIN)[0]
    tail = text.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{draw_table(study, runs)}{END}{tail}", encoding="utf-8")
    methods = {name: [curves_of(run) for run in runs if run["method"] == name] for name in study.methods}
    methods = {name: curves for name, curves in methods.items() if curves}
    (PAGES / "figures" / f"smollm2_{study.name}.png").write_bytes(figure(Comparison(study.name, (), methods)))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "smollm2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    arguments = parser.parse_args(words)
    arguments.model, arguments.out = arguments.model.resolve(), arguments.out.resolve()
    study = STUDIES[arguments.study]
    end = time.monotonic() + 60 * arguments.minutes
    pending = pending_runs(study, read_kept(study.results), arguments.seeds)
    if pending and arguments.minutes > 0 and not (arguments.model / "config.json").is_file():
        sys.exit(
            f"{arguments.model} is absent; make it with: rltrain get-model smollm2 --out {arguments.model}"
        )
    for seed, method in pending:
        if time.monotonic() >= end:
            break
        print(f"{study.name}: {method}, seed {seed}", flush=True)
        train(study, seed, method, arguments)
    write_page(study)
    left = len(pending_runs(study, read_kept(study.results), arguments.seeds))
    print(f"{study.results.name}: {left} runs left", flush=True)


if __name__ == "__main__":
    main()
