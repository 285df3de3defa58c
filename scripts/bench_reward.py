"""Reward against wall-clock: trains a model on the sums of recipes/policy/sums.yaml with rltrain and with
TRL's GRPOTrainer, one after the other for the same time.

    rltrain get-model smollm2 --out .cache/smollm2
    python scripts/bench_reward.py --trl .cache/trl --model .cache/smollm2 [--minutes 10] [--threads 2]
        [--precision float32] [--json FILE] [--figure FILE.png]

Both train on the recipe's prompts with its reward functions, batch, optimizer and clip loss, in one
precision; each draws its own order of the prompts and its own completions. A point is the mean reward of a
step's batch, at the time when the step ends, in seconds since the first step began. A process per trainer;
loading is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from peer_bench import TRL_GRPO, Turns, peak_bytes, worker_environment

SCRIPT = Path(__file__).resolve()
RECIPE = SCRIPT.parents[1] / "recipes" / "policy" / "sums.yaml"
TRAINERS = ("rltrain", "trl")
LAST = 10  # steps over which the final reward is averaged


class Clock:
    """Reports each step's reward until the time is over, then ends the process."""

    def __init__(self, turns: Turns, seconds: float) -> None:
        self.turns = turns
        self.limit = seconds
        self.started = perf_counter()

    def step(self, reward: float) -> None:
        seconds = perf_counter() - self.started
        self.turns.say({"seconds": seconds, "reward": reward, "peak": peak_bytes()})
        if seconds >= self.limit:
            os._exit(0)


def recipe_of(arguments: argparse.Namespace) -> Any:
    from rltrain.config.load import load_recipe

    return load_recipe(
        RECIPE,
        overrides=[
            f"model.path={arguments.model.resolve()}",
            f"learner.precision={arguments.precision}",
            "train.steps=1000000",
            "eval.every=0",
            "report.transcripts=0",
        ],
    )


def run_rltrain(recipe: Any, inputs: Any, folder: Path, turns: Turns, seconds: float) -> None:
    from rltrain.build.context import RunContext
    from rltrain.build.online import build_online_run
    from rltrain.checkpoint.run_folder import RunFolder
    from rltrain.process import Process
    from rltrain.report.reporter import Reporter
    from rltrain.train.online import train_online

    class Gate(Reporter):
        def step(self, step: int, metrics: Any, *more: Any) -> None:
            clock.step(float(metrics["reward/mean"]))

    context = RunContext(RunFolder.from_path(folder), process=Process(is_main=False))
    run = dataclasses.replace(build_online_run(recipe, inputs, context), reporter=Gate(None, None, None))
    clock = Clock(turns, seconds)
    train_online(run)


def run_trl(recipe: Any, inputs: Any, folder: Path, turns: Turns, seconds: float) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rewards: list[float] = []
    prompts = inputs.train.prompts

    def reward(
        completions: list[str], completion_ids: list[list[int]], number: list[int], **columns: Any
    ) -> list[float]:
        answers = zip(completions, map(len, completion_ids), number, strict=True)
        groups = [reward_inputs(prompts[index], text, count) for text, count, index in answers]
        values = [score.value for [score] in inputs.grader.score(groups)]
        rewards.extend(values)
        return values

    class Gate(TrainerCallback):
        clock: Clock

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self.clock = Clock(turns, seconds)

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            self.clock.step(statistics.fmean(rewards))
            rewards.clear()

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, padding_side="left", trust_remote_code=False)
    for prompt in prompts:
        if tuple(tokenizer(prompt.text)["input_ids"]) != tuple(prompt.token_ids):
            raise SystemExit(f"bench_reward: the two trainers would read different tokens of {prompt.id}")
    data = Dataset.from_list([{"prompt": each.text, "number": number} for number, each in enumerate(prompts)])
    trainer = GRPOTrainer(
        recipe.model.path, reward, trl_config(recipe, folder, GRPOConfig), data, processing_class=tokenizer
    )
    trainer.add_callback(Gate())
    trainer.train()


def reward_inputs(prompt: Any, text: str, count: int) -> Any:
    """One completion as rltrain's reward functions read it."""
    from rltrain.reward.score import RewardInputs

    return RewardInputs(prompt.text, (text,), (count,), ("stop",), dict(prompt.columns))


def trl_config(recipe: Any, folder: Path, config: Any) -> Any:
    """The recipe's settings under TRL's names."""
    rollout = recipe.rollout
    optimizer = recipe.learner.optimizer
    return config(
        **TRL_GRPO,
        output_dir=str(folder / "trl"),
        bf16=recipe.learner.precision == "bfloat16",
        per_device_train_batch_size=rollout.prompts * rollout.n,
        num_generations=rollout.n,
        max_completion_length=rollout.max_tokens,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=optimizer.max_grad_norm,
    )


def work(arguments: argparse.Namespace) -> None:
    """One trainer, in a process of its own."""
    from rltrain.build.inputs import load_inputs

    turns = Turns()
    recipe = recipe_of(arguments)
    inputs = load_inputs(recipe)
    run = {"rltrain": run_rltrain, "trl": run_trl}[arguments.worker]
    with inputs.grader:
        run(recipe, inputs, arguments.folder, turns, 60 * arguments.minutes)


def measure(trainer: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *sys.argv[1:], "--worker", trainer, "--folder", folder],
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
            env=worker_environment(SCRIPT, arguments),
        )
    if done.returncode:
        raise SystemExit(f"the {trainer} process ended with {done.returncode}; run again with --verbose")
    return [json.loads(line) for line in done.stdout.splitlines()]


def summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "steps": len(steps),
        "seconds": steps[-1]["seconds"],
        "last_reward": statistics.fmean(step["reward"] for step in steps[-LAST:]),
        "peak_gib": max(step["peak"] for step in steps) / 2**30,
    }


def draw(path: Path, series: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
    for name, steps in series.items():
        label = {"rltrain": "rltrain", "trl": "TRL"}[name]
        times, rewards = ([step[key] for step in steps] for key in ("seconds", "reward"))
        axis.plot(times, rewards, label=label, linewidth=1.1, marker=".")
    axis.set_xlabel("seconds since the first step began")
    axis.set_ylabel("mean reward of the batch")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that both train")
    parser.add_argument("--trl", type=Path, help="folder in which TRL is installed, if not here")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each trainer")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show what the trainers print")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return
    series = {trainer: measure(trainer, arguments) for trainer in TRAINERS}
    for trainer, steps in series.items():
        result = summary(steps)
        print(
            f"{trainer:>8} {result['steps']:4} steps in {result['seconds']:.0f} s, reward of the last {LAST} "
            f"{result['last_reward']:.3f}, peak {result['peak_gib']:.2f} GiB"
        )
    if arguments.json:
        record = {
            "summary": {trainer: summary(steps) for trainer, steps in series.items()},
            "series": series,
            "precision": arguments.precision,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "machine": {"platform": platform.platform(), "threads": arguments.threads},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.figure:
        draw(arguments.figure, series)


if __name__ == "__main__":
    main()
