"""Preferences on two ranks: the offline loop under DeepSpeed's ZeRO-2 and the loop of sampled pairs under DDP
give the result of one process.

Both launches use the users' files, over gloo; the tests inspect the prepared model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check

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
    "eval.examples=16",
    "eval.every=2",
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
LEFT_OUT = ("time/", "loss/accuracy", "eval/accuracy", "learner/trained_tokens", "learner/shared_prompts")
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
    cleared = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    environment = cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [
        "--config_file",
        f"recipes/accelerate/{backend}.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    script = str(Path(__file__).with_name("two_ranks_preferences.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [run for rank in range(2) for run in json.loads((folder / f"engaged-{rank}.json").read_text())]


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
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


def test_the_offline_loop_under_zero_2_is_that_of_one_process(random_model: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install rltrain[deepspeed])")
    common = (f"model.path={random_model}", *OFFLINE)
    # KTO's z0 is over the step, across ranks; reference log-probs are computed by both ranks, or read from
    # rank 0's file
    runs = [
        run_of("dpo", *common, "reference.cache=null"),
        run_of("kto", *common, f"reference.cache={tmp_path / 'cache'}"),
    ]
    run_single_process(runs, tmp_path / "one")
    engaged = run_two_processes("zero2", runs, tmp_path / "two")
    assert len(engaged) == 4
    assert all(
        run["ranks"] == 2 and run["stage"] == 2 and "DeepSpeedEngine" in run["policy"] for run in engaged
    )
    for run in runs:
        assert_same(tmp_path / "two" / run["name"], tmp_path / "one" / run["name"])


def test_the_loop_of_sampled_pairs_on_two_ranks_is_that_of_one_process(
    random_model: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_text(REWARD)
    common = (f"model.path={random_model}", f"reward.functions=['{tmp_path / 'odd.py'}:odd']", *ONLINE)
    runs = [run_of("online_dpo", *common)]
    run_single_process(runs, tmp_path / "one")
    engaged = run_two_processes("ddp", runs, tmp_path / "two")
    assert len(engaged) == 2 and all(
        run["ranks"] == 2 and "DistributedDataParallel" in run["policy"] for run in engaged
    )
    steps = [line for line in numbers(tmp_path / "one" / "online_dpo") if "pairs/count" in line]
    assert steps and all(line["pairs/count"] > 0 and line["learner/grad_norm"] > 0 for line in steps)
    assert_same(tmp_path / "two" / "online_dpo", tmp_path / "one" / "online_dpo")
