"""The package from Python, and every file of ``examples/`` at work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rltrain
from rltrain.reward.score import Score
from rltrain.types.samples import RolloutGroup, ScoredGroup

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ("eval.prompts=4", "eval.n=2", "eval.k=[1]", "train.steps=2", "rollout.prompts=8")


def train(model: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of GRPO with ``overrides``."""
    recipe = rltrain.load_recipe(
        EXAMPLES.parent / "recipes/policy/grpo.yaml",
        profile="tiny_cpu",
        overrides=[f"model.path={model}", *SIZES, *overrides],
    )
    assert rltrain.train(recipe, folder) == folder / "model"
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_reward_train_and_evaluate_from_python(random_model: str, tmp_path: Path) -> None:
    overrides = [
        f"loss.policy={EXAMPLES}/my_loss.py:soft_clip",
        f"reward.functions=['{EXAMPLES}/my_reward.py:digits']",
        "learner.updates=2",
        "learner.optimizer.lr=2e-3",
    ]
    lines = train(random_model, tmp_path / "run", *overrides)
    assert [line["step"] for line in lines if line.get("loss/gain", 0) > 0] == [1, 2]
    assert any(line.get("reward/part/digits", 0) > 0 for line in lines)
    recipe = rltrain.load_recipe(tmp_path / "run/recipe.resolved.yaml")
    assert "eval/pass@1" in rltrain.evaluate(tmp_path / "run/model", recipe)


def test_the_environment_plays_episodes(random_model: str, tmp_path: Path) -> None:
    settings = "max_turns: 3, turn_tokens: 4, observation_tokens: 8, workers: 1"
    environment = f"rollout.environment={{name: '{EXAMPLES}/my_environment.py:Guess', {settings}}}"
    lines = train(
        random_model, tmp_path / "run", environment, "rollout.max_tokens=40", "reward.functions=[episode]"
    )
    assert [line["step"] for line in lines if "reward/part/episode" in line] == [1, 2]
    assert any(line.get("reward/max", 0) == 1 for line in lines)


def test_the_loop_written_out_learns(random_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "minimal_grpo.py"
    assert len(path.read_text().splitlines()) <= 120
    spec = importlib.util.spec_from_file_location("minimal_grpo", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minimal_grpo", example)
    spec.loader.exec_module(example)

    def share_of_sevens(group: RolloutGroup, _: int) -> ScoredGroup:
        shares = [each.text.count("7") / len(each.token_ids) for each in group.completions]
        scores = tuple(Score(share) for share in shares)
        return ScoredGroup(group.group, group.prompt, group.completions, scores)

    monkeypatch.setattr(example, "grade", share_of_sevens)
    monkeypatch.setattr(example, "LEARNING_RATE", 1e-2)
    rewards = example.train(random_model, 12, 0)
    assert rewards[-1] > 2 * rewards[0] > 0


def test_the_package_imports_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, rltrain\n"
        "print('pydantic' in sys.modules)\n"
        "names = {name: getattr(rltrain, name) for name in ('method', 'load_recipe', 'train', 'Prompt')}\n"
        "print('torch' in sys.modules, all(map(callable, names.values())))\n"
        "import rltrain.train.loop\n"
        "print(callable(rltrain.train), rltrain.train is names['train'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False", "True", "True", "True"], done.stderr


def test_every_offered_name_exists_and_others_do_not() -> None:
    names = {"train", "evaluate", "load_recipe", "method", "Prompt", "TrainBatch", "PairBatch"}
    assert names <= {name for name in dir(rltrain) if callable(getattr(rltrain, name))}
    with pytest.raises(AttributeError, match="module 'rltrain' has no attribute 'trane'"):
        _ = rltrain.trane
