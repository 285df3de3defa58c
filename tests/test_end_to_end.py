"""Whole runs through the command's own function: reward rises, engines follow the learner, every
recipe runs, ranks agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.cli.evaluate import eval_command
from rltrain.cli.replay import plan_command, replay_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from support.launch import run_ranks

ROOT = Path(__file__).parents[1]
# tests/golden/test_golden.py runs these, to the same ends and to recorded numbers
GOLDEN = frozenset(
    {
        *("cispo", "clip_cov", "dr_grpo", "gmpo", "grpo", "gsm8k_calculator", "gspo", "hapo", "kl_cov"),
        *("reinforce_pp", "rloo", "steer"),
    }
)
# a source of rollouts or of rewards each; tests/cli/test_replay.py has the others
REPLAYED = frozenset({"aapo", "aepo", "dapo", "empg_calculator", "gain_rl", "prime"})
RECIPES = sorted(path for path in (ROOT / "recipes" / "policy").glob("*.yaml") if path.stem not in GOLDEN)

# A reward that an untrained model can climb: the share of the digit 7, correct when every character is one.
SEVENS = """
from rltrain.reward.score import Score

def sevens(inputs):
    shares = [text.count("7") / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.5)}) for share in shares]
"""


def run(recipe: Path, model: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train ``recipe`` under tiny_cpu; the lines of its metrics.jsonl."""
    settings = [f"model.path={model}", "eval.prompts=8", *overrides]
    assert (
        train_command(check(load_recipe(recipe, profile="tiny_cpu", overrides=settings)).recipe, folder, [])
        == 0
    )
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


@pytest.fixture
def sevens(tmp_path: Path) -> str:
    path = tmp_path / "sevens.py"
    path.write_text(SEVENS)
    return f"reward.functions=['{path}:sevens']"


def test_grpo_raises_the_reward_and_leaves_a_model_with_the_learners_logits(
    random_model: str, sevens: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    lines = run(
        ROOT / "recipes/policy/grpo.yaml",
        random_model,
        folder,
        sevens,
        "train.steps=12",
        "learner.optimizer.lr=2e-3",
        "eval.spectrum=true",
    )
    ranks = steps(lines, "eval/rank_me")
    assert len(ranks) == 2 and all(1 <= rank <= 8 for rank in ranks)  # of 8 prompts, one state each
    rewards = steps(lines, "reward/mean")
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert (
        max(steps(lines, "rollout/mismatch_abs")) < 1e-4
    )  # the engine held the learner's weights at every step
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 12]
    assert steps(lines, "eval/pass@1")[1] > steps(lines, "eval/pass@1")[0]

    made = {path.name for path in folder.iterdir()}
    assert made >= {
        "recipe.resolved.yaml",
        "environment.json",
        "metrics.jsonl",
        "transcripts.jsonl",
        "report.html",
        "model",
    }
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    assert "7" in tokenizer.decode(
        model.generate(tokenizer("<user>12+34=<assistant>", return_tensors="pt").input_ids, max_new_tokens=8)[
            0
        ]
    )

    out = tmp_path / "eval.json"
    resolved = load_recipe(folder / "recipe.resolved.yaml")
    assert eval_command(str(folder / "model"), resolved, out) == 0
    # Same weights, same prompts, same seeds: the run's last evaluation, to the digit.
    assert json.loads(out.read_text())["eval/pass@1"] == steps(lines, "eval/pass@1")[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_under_tiny_cpu(
    recipe: Path, random_model: str, sevens: str, tmp_path: Path
) -> None:
    few_games: tuple[str, ...] = ()
    if "name: textworld" in recipe.read_text():
        pytest.importorskip("textworld", reason="textworld is not installed (pip install rltrain[textworld])")
        # a game takes three seconds to make, and the profile has 32
        few_games = ("data.options={games: 4, held_out_games: 2}", "rollout.prompts=4")
    # DAPO's and CISPO's second reward, the length penalty, is kept where a recipe has one.
    penalised = "length" in recipe.read_text()
    functions = (
        sevens.replace("]", ", {name: length, max_tokens: 8, buffer_tokens: 2}]") if penalised else sevens
    )
    if "advantage: none" in recipe.read_text():  # learns without a reward, which is then only reported
        functions = f"reward.functions=[{{name: {sevens.split(chr(39))[1]!r}, weight: 0}}]"
    # a model that is never right has PACED's weight 0 everywhere
    smoothed = ("control.0={name: paced, smooth: true}",) if "control: [paced]" in recipe.read_text() else ()
    lines = run(
        recipe,
        random_model,
        tmp_path / "run",
        functions,
        *smoothed,
        *few_games,
        "train.steps=2",
        "checkpoint.every=1",
        "checkpoint.keep=1",
    )
    for name in ("loss/total", "learner/grad_norm", "learner/entropy_mean"):
        assert torch.isfinite(torch.tensor(steps(lines, name))).all(), name
    assert max(steps(lines, "rollout/mismatch_abs")) < 1e-4
    assert sum(steps(lines, "learner/grad_norm")) > 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    if recipe.stem in REPLAYED:  # its journal makes the same run again, to the bit, evaluations included
        assert replay_command(plan_command(tmp_path / "run", None, [], check=True), None, check=True) == 0


@pytest.mark.vllm
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_real_vllm_follows_the_learner_through_a_run(
    tied: bool, random_model: str, random_tied_model: str, sevens: str, tmp_path: Path
) -> None:
    model = random_tied_model if tied else random_model
    settings = ("rollout.engine=vllm", "train.steps=6", "learner.optimizer.lr=2e-3", "learner.updates=2")
    lines = run(ROOT / "recipes/policy/grpo.yaml", model, tmp_path / "run", sevens, *settings)
    assert max(steps(lines, "rollout/mismatch_abs")) < 1e-4
    assert steps(lines, "learner/version") == [2, 4, 6, 8, 10, 12]
    assert steps(lines, "reward/mean")[-1] > steps(lines, "reward/mean")[0]


@pytest.mark.slow
def test_two_ranks_take_the_steps_that_one_takes(random_model: str, sevens: str, tmp_path: Path) -> None:
    settings = (
        sevens,
        "train.steps=4",
        "learner.updates=2",
        "learner.tokens_per_micro_batch=512",
        "eval.prompts=8",
    )
    overrides = [word for setting in (*settings, f"model.path={random_model}") for word in ("--set", setting)]
    for ranks in (1, 2):
        folder = str(tmp_path / f"ranks{ranks}")
        command = ["-m", "rltrain", "train", str(ROOT / "recipes/policy/grpo.yaml"), "--profile", "tiny_cpu"]
        run_ranks("ddp", [*command, "--run", folder, *overrides], ranks=ranks)
    runs = [metrics(tmp_path / f"ranks{ranks}") for ranks in (1, 2)]
    single, double = runs
    for name in ("reward/mean", "learner/grad_norm", "learner/entropy_mean", "loss/total", "eval/reward"):
        assert steps(double, name) == pytest.approx(steps(single, name), rel=1e-3, abs=1e-5), name
    assert steps(double, "rollout/completions") == [192.0] * 4
