"""DAPO on a user's data with the user's reward, loss, advantage and control: a recipe of ten lines and a file
of code, trained, continued and put on two ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import UserError
from support.launch import run_ranks

ROOT = Path(__file__).parents[1]
METHODS = '''\
from __future__ import annotations

import torch
from torch import Tensor

from rltrain.reward.score import Score
from rltrain.loss.policy.ratio import log_ratio
from rltrain.registry import method
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch


def my_reward(inputs, *, digit: str = "7"):
    shares = [text.count(digit) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.1)}) for share in shares]


@method("my_advantage", needs={"mask"})
def my_advantage(rewards: Tensor, group: Tensor, *, mask: Tensor, scale: float = 1.0) -> Tensor:
    """Rewards minus the mean of their prompt's completions, times scale."""
    means = torch.stack([rewards[group == prompt].nanmean() for prompt in group])
    return torch.nan_to_num(rewards - means)[:, None] * mask * scale


@method("my_control", needs={"old_entropy"}, traits={"token_level", "fraction:share"})
def my_control(batch: TrainBatch, *, share: float = 0.5) -> TrainBatch:
    """Drops the tokens with the lowest entropy."""
    limit = batch.old_entropy[batch.mask].quantile(1 - share)
    notes = {"my_limit": float(limit)}
    return batch.replace(weights=batch.weights * (batch.old_entropy >= limit), notes={**batch.notes, **notes})


@method("my_loss", needs={"old_logp"}, traits={"owns_clipping"})
def my_loss(policy: PolicyTokens, batch: TrainBatch, *, eps: float = 0.2) -> TokenLoss:
    """The gain of the ratio, squashed by tanh within 1 - eps and 1 + eps."""
    gain = eps * torch.tanh((log_ratio(policy, batch).exp() - 1) / eps)
    return TokenLoss(-batch.advantages * gain * batch.mask, {"gain": gain.detach().abs()})
'''
RECIPE = """\
extends: dapo
data: {train: problems.jsonl, max_prompt_tokens: 16}
reward:
  functions: [{name: 'methods.py:my_reward', digit: '7'}]
advantage: {name: 'methods.py:my_advantage', scale: 2.0}
control: [{name: 'methods.py:my_control', share: 0.5}]
loss:
  policy: {name: 'methods.py:my_loss', eps: 0.3}
learner: {updates: 4}
train: {steps: 2}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the recipe, its code and its data."""
    (tmp_path / "methods.py").write_text(METHODS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [{"prompt": f"{number}+{number}=", "answer": str(2 * number)} for number in range(10, 60)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def overrides(model: str, project: Path) -> list[str]:
    """What replaces the sizes of tiny_cpu, whose data are additions, by the user's data again."""
    data = f"data={{train: {project}/problems.jsonl, max_prompt_tokens: 16}}"
    return [f"model.path={model}", data, "train.steps=2", "rollout.prompts=8", "learner.optimizer.lr=2e-3"]


def train(model: str, project: Path, run: str = "run", resume: str = "auto") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    recipe = load_recipe(
        project / "recipe.yaml",
        profile="tiny_cpu",
        overrides=[*overrides(model, project), "checkpoint.every=1"],
    )
    assert train_command(check(recipe).recipe, project / run, [], resume) == 0
    return [json.loads(line) for line in (project / run / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_of_ten_lines_trains_and_continues_with_the_same_code_only(
    random_model: str, project: Path
) -> None:
    assert len(RECIPE.splitlines()) == 10
    lines = train(random_model, project)
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2]
    for line in lines:
        if "loss/total" in line:
            assert line["learner/grad_norm"] > 0 and line["control/my_limit"] > 0
            assert 0 <= line["loss/gain"] <= 0.3 and line["reward/part/my_reward"] > 0
    resolved = (project / "run/recipe.resolved.yaml").read_text()
    assert resolved.count("sha256:") == 4 and resolved.count(f"{project}/methods.py:my_") == 4

    checkpoint = str(project / "run/checkpoints/step-1")
    continued = train(random_model, project, "continued", checkpoint)
    assert continued[-1]["loss/gain"] == lines[-1]["loss/gain"]
    (project / "methods.py").write_text(METHODS.replace("torch.tanh", "torch.sin"))
    with pytest.raises(UserError, match=r"code of loss.policy \(.*methods.py:my_loss\): sha256:"):
        train(random_model, project, "other", checkpoint)


@pytest.mark.slow
def test_two_ranks_load_the_same_file(random_model: str, project: Path) -> None:
    settings = [word for item in overrides(random_model, project) for word in ("--set", item)]
    command = ["-m", "rltrain", "train", "recipe.yaml", "--profile", "tiny_cpu", "--run", "run", *settings]
    run_ranks("ddp", command, folder=project)
    lines = [json.loads(line) for line in (project / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("loss/gain", 0) > 0]
