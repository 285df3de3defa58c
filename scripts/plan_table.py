"""Writes docs/plan.md, what every recipe takes on GPUs, and into every recipe the smallest cluster it fits.

    python scripts/plan_table.py [--check]

The numbers are those of ``rltrain plan --gpus --gpu-gb``, with the shapes of ``scripts/model_shapes.py``.
``--check`` changes nothing and exits with 1 if the page would change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).parent
sys.path.insert(0, str(SCRIPTS))

from model_shapes import PUBLISHED, shape_of_published  # noqa: E402

from rltrain.config.capacity.cluster import Backend, Cluster  # noqa: E402
from rltrain.config.capacity.constants import CARDS, GB, Card  # noqa: E402
from rltrain.config.capacity.memory import Phase, phases_of, with_utilization  # noqa: E402
from rltrain.config.capacity.remedy import smallest_cluster  # noqa: E402
from rltrain.config.capacity.report import CapacityPlan, plan_capacity  # noqa: E402
from rltrain.config.capacity.workload import Workload, workload_of  # noqa: E402
from rltrain.config.load import load_recipe  # noqa: E402

ROOT = SCRIPTS.parent
PAGE = ROOT / "docs" / "plan.md"
FOLDERS = {
    "policy": "Policy gradients",
    "preference": "Preferences",
    "process_reward": "Reward models",
    "supervised": "Supervised fine-tuning",
}
NODE = Cluster(8, int(85.5 * GB), Backend.fsdp2)
CARD_BYTES = {"80 GB": int(85.5 * GB), "141 GB": 141 * GB}
STATEMENT = "# Smallest cluster by rltrain plan: "  # begins a recipe's line
COLUMNS = ("rest", "start", "push", "rollout", "annotate", "update", "save")
PHASES = {
    "rest": "learner at rest",
    "start": "engine start",
    **{name: name for name in ("push", "rollout", "annotate", "update", "save")},
}

HEAD = """\
# What recipes take on GPUs

Made by `scripts/plan_table.py` from the arithmetic of `rltrain plan RECIPE --gpus N --gpu-gb M`: no number
on this page was measured, and the constants that no config states (`rltrain/config/capacity/constants.py`)
are estimates. GB are 1e9 bytes; a GPU of 80 GB has 85.5 of them. Numbers are GB per GPU in each phase on
eight GPUs of 80 GB under FSDP2, **bold** where they exceed the GPU; of the engine, that one longest row
fits its share is checked too. *u* is vLLM's share of a GPU: what learner and frozen models leave of it, less
3 %, so that the phases in which the engine is awake all but fill the GPU. *Nearest* is the first setting
that fits, tried in this order: fewer tokens per micro-batch, more ranks that hold an engine together (tp,
`rollout.vllm.tensor_parallel`), another backend, twice the GPUs. *Smallest* is the fewest GPUs, a power of
two, under FSDP2 (one GPU: nothing is wrapped) with the recipe's own tokens per micro-batch, and tp where it
has to differ; each recipe says it too. Seconds are those of a step with rows of full length, one round of
sampling, rewards not included, by the named rates of an H100. Frozen models are kept in the learner's
precision and divided by FSDP2 and ZeRO; models that score completions are whole on every GPU.
"""


def recipes_in(folder: str) -> Iterator[tuple[Path, Workload]]:
    """The recipes of a folder whose model is published, by name."""
    for path in sorted((ROOT / "recipes" / folder).glob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.model.path in PUBLISHED:
            yield path, workload_of(recipe, shape_of_published)


def skipped_recipes() -> list[str]:
    """Recipes whose model is a folder that users make."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))]
    return [
        f"{path.parent.name}/{path.stem}" for path in paths if load_recipe(path).model.path not in PUBLISHED
    ]


def smallest_text(load: Workload, gpu_bytes: int) -> str:
    """The smallest cluster of such GPUs, in a table's cell."""
    result = smallest_cluster(load, gpu_bytes, Backend.fsdp2)
    if result is None:
        return "none"
    cluster, changed = result
    parts = [str(cluster.gpus), *(f"{short} {value}" for short, _, value in changes_of(load, changed))]
    return ", ".join(parts)


def changes_of(load: Workload, changed: Workload) -> Iterator[tuple[str, str, str]]:
    """(short name, key, value) of what the engine of ``changed`` has in another way."""
    if load.engine is None or changed.engine is None:
        return
    if changed.engine.utilization != load.engine.utilization:
        yield "u", "rollout.vllm.gpu_memory_utilization", f"{changed.engine.utilization:g}"
    if changed.engine.ranks != load.engine.ranks:
        yield "tp", "rollout.vllm.tensor_parallel", str(changed.engine.ranks)


def statement_of(load: Workload) -> str:
    """A recipe's line on the smallest clusters that it fits, with its own tokens per micro-batch."""
    parts = []
    for size, gpu_bytes in CARD_BYTES.items():
        result = smallest_cluster(load, gpu_bytes, Backend.fsdp2)
        if result is None:
            parts.append(f"none of {size}")
            continue
        cluster, changed = result
        settings = "".join(f" with {key} {value}" for _, key, value in changes_of(load, changed))
        parts.append(f"{cluster.gpus} x {size}{settings}")
    return STATEMENT + "; ".join(parts)


def write_statement(path: Path, load: Workload) -> None:
    """Puts ``statement_of`` above the recipe's first key."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(STATEMENT)]
    first = next(number for number, line in enumerate(kept) if not line.startswith("#"))
    kept.insert(first, statement_of(load))
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def cell_of(phase: Phase | None) -> str:
    if phase is None:
        return ""
    text = f"{phase.total / GB:.1f}"
    return text if phase.fits else f"**{text}**"


def nearest_text(plan: CapacityPlan) -> str:
    if plan.fits:
        return "fits"
    if plan.remedy is None:
        return "none"
    changes = plan.remedy
    parts = [
        f"{name} {value}"
        for name, value in (
            ("tokens", changes.tokens_per_micro_batch),
            ("u", changes.gpu_memory_utilization),
            ("tp", changes.tensor_parallel),
            ("", changes.backend),
            ("GPUs", changes.gpus),
        )
        if value is not None
    ]
    return ", ".join(parts).strip()


def share_text(load: Workload) -> str:
    engine = with_utilization(load, NODE).engine
    return "" if engine is None or engine.name != "vllm" else f"{engine.utilization:g}"


def row_of(path: Path, load: Workload) -> str:
    phases = {phase.name: phase for phase in phases_of(load, NODE)}
    plan = plan_capacity(load, NODE, CARDS[Card.h100])
    seconds = "" if plan.step_seconds is None else f"{plan.step_seconds:,.0f}"
    cells = [
        path.stem,
        f"{load.policy.parameters / 1e9:.1f}",
        share_text(load),
        *(cell_of(phases.get(PHASES[name])) for name in COLUMNS),
        nearest_text(plan),
        *(smallest_text(load, size) for size in CARD_BYTES.values()),
        seconds,
    ]
    return f"| {' | '.join(cells)} |"


def page_text() -> str:
    titles = [
        "recipe",
        "1e9 parameters",
        "u",
        *COLUMNS,
        "nearest",
        *(f"smallest, {name}" for name in CARD_BYTES),
        "s",
    ]
    head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    parts = [HEAD]
    for folder, title in FOLDERS.items():
        rows = [row_of(path, load) for path, load in recipes_in(folder)]
        parts.append(f"## {title} (`recipes/{folder}`)\n\n{head}" + "\n".join(rows) + "\n")
    names = ", ".join(f"`{name}`" for name in skipped_recipes())
    parts.append(
        f"Not in the tables, since their model is made by the user: {names}; "
        "`rltrain plan` reads its `config.json`.\n"
    )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = page_text()
    if arguments.check:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        sys.exit(0 if is_current else "docs/plan.md is not what scripts/plan_table.py writes; run it")
    PAGE.write_text(text, encoding="utf-8")
    for folder in FOLDERS:
        for path, load in recipes_in(folder):
            write_statement(path, load)


if __name__ == "__main__":
    main()
