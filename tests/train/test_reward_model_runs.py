"""Whole runs with a reward model of this project in the learner's process: as a reward, and as the
judge of pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain.cli.evaluate import eval_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import UserError
from rltrain.learner.reward_model import rewards_of
from rltrain.types.policy import TokenRows

ROOT = Path(__file__).parents[2] / "recipes"
FEW = (
    "train.steps=2",
    "rollout.prompts=6",
    "rollout.n=4",
    "eval.prompts=4",
    "eval.n=2",
    "eval.k=[1]",
    "reward.workers=1",
    "learner.optimizer.lr=1e-3",
)


def run(recipe: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    checked = check(load_recipe(ROOT / recipe, profile="tiny_cpu", overrides=overrides)).recipe
    assert train_command(checked, folder, [], "never") == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reward_model(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of recipes/process_reward/orm.yaml, after a few steps."""
    folder = tmp_path_factory.mktemp("orm") / "run"
    run(
        "process_reward/orm.yaml",
        folder,
        f"model.path={random_model}",
        "train.steps=3",
        "eval.examples=8",
        "data.eval=null",
    )
    return str(folder / "model")


@pytest.mark.slow
def test_the_reward_is_the_models_number_of_what_was_sampled(
    reward_model: str, random_model: str, tmp_path: Path, monkeypatch: Any
):
    from rltrain.rollout import colocated

    graded: list[Any] = []
    score_groups = colocated.score_groups

    def keep_scored(groups: Any, grader: Any, occasion: str) -> Any:
        scored = score_groups(groups, grader, occasion)
        if occasion == "step 1":
            graded.append(scored)
        return scored

    monkeypatch.setattr(colocated, "score_groups", keep_scored)
    functions = (
        f"reward.functions=[{{name: reward_model, path: {reward_model}, squash: none, weight: 2.0}}, {{name: "
        "math_answer, weight: 0.0}]"
    )
    lines = run(
        "policy/grpo_reward_model.yaml", tmp_path / "run", f"model.path={random_model}", functions, *FEW
    )
    [groups] = graded
    flat = [
        (group.prompt.token_ids, completion.token_ids) for group in groups for completion in group.completions
    ]
    expected = rewards_of(
        reward_model,
        TokenRows(tuple(p for p, _ in flat), tuple(c for _, c in flat)),
        tokens_per_micro_batch=64,
    )
    assert [score.value / 2 for group in groups for score in group.scores] == pytest.approx(
        expected, abs=1e-5
    )
    assert {name for group in groups for score in group.scores for name in score.parts} == {
        "reward_model",
        "math_answer",
        "math_answer/correct",
        "correct",
    }
    [first, *_] = [line for line in lines if "reward/mean" in line]
    assert first["reward/mean"] == pytest.approx(2 * sum(expected) / len(expected), abs=1e-4)
    assert first["reward/part/reward_model"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert first["learner/grad_norm"] > 0
    # by itself it needs no other reward, in training and in rltrain eval
    single_function = functions.replace(", {name: math_answer, weight: 0.0}", "")
    recipe = load_recipe(
        ROOT / "policy/grpo_reward_model.yaml",
        profile="tiny_cpu",
        overrides=(f"model.path={random_model}", single_function, *FEW),
    )
    assert eval_command(random_model, check(recipe).recipe, tmp_path / "eval.json") == 0
    assert json.loads((tmp_path / "eval.json").read_text())["eval/reward"] != 0.0


@pytest.mark.slow
def test_it_judges_the_pairs_of_online_dpo(reward_model: str, random_model: str, tmp_path: Path):
    judge = f"pairs.judge={{name: reward_model, path: {reward_model}}}"
    lines = run("preference/online_dpo.yaml", tmp_path / "run", f"model.path={random_model}", judge, *FEW)
    steps = [line for line in lines if "pairs/count" in line]
    assert all(
        line["pairs/count"] > 0 and line["pairs/unjudged"] == 0 and line["pairs/p_chosen"] > 0.5
        for line in steps
    )


def test_what_it_cannot_read_is_said_before_weights_are_loaded(random_model: str, tmp_path: Path):
    functions = f"reward.functions=[{{name: reward_model, path: {random_model}, prompt_column: question}}]"
    with pytest.raises(UserError, match=r"prompt_column is 'question', and .* its columns are: answer"):
        run("policy/grpo_reward_model.yaml", tmp_path / "run", f"model.path={random_model}", functions, *FEW)
    with pytest.raises(UserError, match=r"reward.functions.0.path .*none. is no model folder"):
        missing = f"reward.functions=[{{name: reward_model, path: {tmp_path}/none}}]"
        run("policy/grpo_reward_model.yaml", tmp_path / "run", f"model.path={random_model}", missing, *FEW)
