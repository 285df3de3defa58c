"""Preferences on two ranks, the offline loop and the loop of sampled pairs, give the result of one process.

One launch per backend makes its runs one after the other, with the users' files, over gloo; the tests inspect
the prepared model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.report.names import reproducible_metrics
from support.launch import run_ranks

ROOT = Path(__file__).parents[2]
REWARD = """
from rltrain.reward.score import Score

def odd(inputs):
    return [Score(sum(ord(letter) % 2 for letter in text) / max(len(text), 1)) for text in inputs.completions]
"""
# Several micro-batches on each rank, active clipping, weight decay on matrices only, and an eps above the
# rounding noise of a gradient, which AdamW would otherwise turn into steps of the size of the learning rate.
OPTIMIZER = (
    "learner.optimizer.lr=5e-4",
    "learner.optimizer.eps=1e-5",
    "learner.optimizer.weight_decay=0.1",
    "learner.optimizer.max_grad_norm=0.5",
    "learner.optimizer.schedule=cosine",
    "train.deadline_seconds=120",
)
OFFLINE = (
    "train.examples=12",
    "train.steps=4",
    "data.max_examples=26",  # the second epoch begins after step 2
    "eval.examples=16",
    "eval.every=2",
    "eval.spectrum=true",
    "learner.tokens_per_micro_batch=128",
)
ONLINE = (
    "train.steps=3",
    "rollout.prompts=8",
    "rollout.n=4",
    "rollout.mismatch_stop=1e-4",
    "rollout.mismatch_patience=1",
    "learner.updates=2",
    "learner.tokens_per_micro_batch=128",
    "data.eval=null",
    "reward.workers=1",
)
# At the first step the policy is its reference, and the sign of rounding errors decides what an accuracy
# counts; sharded ranks read a pair's prompt with each of its completions.
LEFT_OUT = ("loss/accuracy", "eval/accuracy", "learner/trained_tokens", "learner/shared_prompts")
pytestmark = pytest.mark.slow


def run_of(recipe: str, *overrides: str) -> dict[str, Any]:
    return {
        "recipe": f"recipes/preference/{recipe}.yaml",
        "name": recipe,
        "overrides": [*OPTIMIZER, *overrides],
    }


def run_single_process(runs: list[dict[str, Any]], folder: Path) -> None:
    """Trains every run in this process."""
    for run in runs:
        recipe = check(
            load_recipe(ROOT / run["recipe"], profile="tiny_cpu", overrides=run["overrides"])
        ).recipe
        assert train_command(recipe, folder / run["name"], [], "never") == 0


def run_two_processes(backend: str, runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Trains every run on two ranks under ``recipes/accelerate/<backend>.yaml``; facts about their models."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(runs))
    run_ranks(backend, [str(Path(__file__).with_name("two_ranks_preferences.py")), str(folder)])
    return [run for rank in range(2) for run in json.loads((folder / f"engaged-{rank}.json").read_text())]


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in reproducible_metrics(line).items()
            if isinstance(value, int | float) and not key.startswith(LEFT_OUT)
        }
        for line in lines
    ]


def assert_same(run_folder: Path, expected: Path) -> None:
    """Every metric to 1e-4, and the weights up to the order of float32 sums."""
    for line, want in zip(numbers(run_folder), numbers(expected), strict=True):
        assert line.keys() == want.keys()
        for name in line:
            assert line[name] == pytest.approx(want[name], rel=1e-4, abs=5e-6), (line["step"], name)
    weights, expected_weights = (load_file(run / "model/model.safetensors") for run in (run_folder, expected))
    assert weights.keys() == expected_weights.keys() and weights
    for name, weight in weights.items():
        assert float((weight - expected_weights[name]).abs().max()) < 2e-5, name


@pytest.fixture(scope="module")
def single_process(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process for each name; KTO's reference log-probs are in its ``cache``."""
    folder = tmp_path_factory.mktemp("single")
    (folder / "odd.py").write_text(REWARD)
    run_single_process([planned_run(name, random_model, folder, folder) for name in KINDS], folder)
    steps = [line for line in numbers(folder / "online_dpo") if "pairs/count" in line]
    assert steps and all(line["pairs/count"] > 0 and line["learner/grad_norm"] > 0 for line in steps)
    return folder


KINDS = ("dpo", "kto", "online_dpo", "spo")


def planned_run(name: str, model: str, folder: Path, cache: Path) -> dict[str, Any]:
    """KTO's z0 is over the step, across ranks; its reference log-probs are in a file of rank 0 in ``cache``,
    DPO's are computed by both ranks.
    """
    if name == "online_dpo":
        settings = (f"reward.functions=['{folder / 'odd.py'}:odd']", *ONLINE)
    else:
        settings = (*OFFLINE, f"reference.cache={cache / 'cache' if name == 'kto' else 'null'}")
    return run_of(name, f"model.path={model}", *settings)


@pytest.mark.parametrize(
    ("backend", "names", "wrapper"),
    [
        ("ddp", KINDS, "DistributedDataParallel"),
        ("fsdp2", ("dpo", "spo"), "FSDPModule"),
        ("zero2", ("dpo", "kto"), "DeepSpeedEngine"),
    ],
)
def test_two_ranks_make_the_runs_of_one_process(
    backend: str,
    names: tuple[str, ...],
    wrapper: str,
    single_process: Path,
    random_model: str,
    tmp_path: Path,
) -> None:
    # under ZeRO-2 the file of the single process is read, under DDP rank 0 writes one
    cache = single_process if backend == "zero2" else tmp_path
    runs = [planned_run(name, random_model, single_process, cache) for name in names]
    engaged = run_two_processes(backend, runs, tmp_path / "two")
    assert len(engaged) == 2 * len(names)
    for run in engaged:
        assert run["ranks"] == 2 and wrapper in run["policy"]
        assert run["stage"] == (2 if backend == "zero2" else None)
    for name in names:
        assert_same(tmp_path / "two" / name, single_process / name)
