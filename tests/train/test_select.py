"""``rltrain eval --select``: who is chosen, what it is worth, and what is refused before anything is
sampled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from rltrain.cli.app import app
from rltrain.errors import UserError
from rltrain.learner.reward_model import rewards_of
from rltrain.types.policy import TokenRows

ROOT = Path(__file__).parents[2]
# an untrained model can be right here: its first character decides, and is its answer
REWARD = """
from rltrain.reward.score import Score

def early(inputs):
    scores = []
    for text in inputs.completions:
        correct = float(text[:1] in "01234")
        scores.append(Score(correct, {"correct": correct}, answer=text[:1]))
    return scores
"""


@pytest.fixture(scope="module")
def reward_model(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rm") / "rm"
    AutoModelForSequenceClassification.from_pretrained(random_model, num_labels=1).save_pretrained(path)
    for file in Path(random_model).glob("token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return str(path)


def run(model: str, folder: Path, *arguments: str) -> dict[str, float]:
    (folder / "early.py").write_text(REWARD)
    settings = (
        f"reward.functions=['{folder / 'early.py'}:early']",
        "reward.workers=1",
        "eval.prompts=6",
        "eval.n=4",
        "eval.k=[1,4]",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    recipe = (
        "--recipe",
        str(ROOT / "recipes/policy/grpo.yaml"),
        "--profile",
        "tiny_cpu",
        "--set",
        f"model.path={model}",
    )
    command = ["eval", model, *recipe, *words, "--out", str(folder / "out.json"), *arguments]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    return json.loads((folder / "out.json").read_text())


def test_every_way_to_choose_in_one_run(
    random_model: str, random_tied_model: str, reward_model: str, tmp_path: Path
) -> None:
    names = ("implicit_prm", "rm", "majority", "weighted_majority", "oracle")
    chosen = [word for name in names for word in ("--select", name)]
    models = (
        "--prm",
        random_tied_model,
        "--prm-reference",
        random_model,
        "--beta",
        "0.05",
        "--rm",
        reward_model,
        "--kl-to",
        random_model,
    )
    metrics = run(random_model, tmp_path, *chosen, *models)
    for name in names:
        assert metrics[f"eval/{name}@1"] == pytest.approx(metrics["eval/avg@4"])  # of one, nobody chooses
        assert metrics[f"eval/{name}@4_low"] <= metrics[f"eval/{name}@4"] <= metrics["eval/oracle@4"]
        assert f"eval/{name}@8" not in metrics  # there are four
    assert metrics["eval/oracle@4"] == pytest.approx(metrics["eval/pass@4"])
    assert metrics["eval/kl_spent@4"] == pytest.approx(0.636294, abs=1e-6)
    assert metrics["eval/kl_to"] == pytest.approx(0.0, abs=1e-4)  # the model is that model
    assert len({metrics[f"eval/{name}@2"] for name in names}) > 2


def test_a_models_distance_is_that_of_its_own_samples(
    random_model: str, random_tied_model: str, tmp_path: Path
) -> None:
    metrics = run(random_model, tmp_path, "--kl-to", random_tied_model)
    assert metrics["eval/kl_to_low"] > 0
    n = metrics["eval/kl_to_as_n"]
    assert torch.log(torch.tensor(n)).item() - (n - 1) / n == pytest.approx(metrics["eval/kl_to"], rel=1e-4)


def test_a_scalar_head_judges_the_last_token_of_each_row(reward_model: str) -> None:
    rows = TokenRows(((5, 6), (5,), (7, 8)), ((9,), (10, 11), (12, 13, 14)))
    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_model)
    model.config.pad_token_id = 0
    expected = [
        model(torch.tensor([p + c])).logits.item()
        for p, c in zip(rows.prompts, rows.completions, strict=True)
    ]
    assert rewards_of(reward_model, rows, tokens_per_micro_batch=4) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--select", "implicit_prm"), "--select implicit_prm needs --prm"),
        (("--select", "rm"), "--select rm needs --rm"),
        (("--select", "weighted_majority"), "name it with --prm or --rm"),
        (("--select", "implicit_prm", "--prm", "MODEL"), "--prm needs --beta"),
        (("--select", "majority", "--set", "eval.n=1", "--set", "eval.k=[1]"), "nothing to choose from"),
        (("--kl-to", "MODEL", "--set", "eval.temperature=0.5"), "set eval.temperature to 1"),
    ],
)
def test_what_is_missing_is_said_first(
    arguments: tuple[str, ...], said: str, random_model: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run(random_model, tmp_path, *(random_model if word == "MODEL" else word for word in arguments))
    assert said in str(error.value)
