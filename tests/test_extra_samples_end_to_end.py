"""Whole runs with rows beside the policy's own: AEPO's tempered source, AAPO's reference, GRAO's
answers, KDRL's teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rltrain.build import inputs as build_materials
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.errors import UserError
from rltrain.learner import frozen_models, trained_model
from rltrain.loss.objective import Objective, ObjectiveShare
from rltrain.train import online
from rltrain.types.policy import PolicyTokens, StepTotals, TrainBatch
from rltrain.types.samples import SOURCE_TEMPERED
from support.launch import run_ranks

ROOT = Path(__file__).parents[1]
AEPO, RELEASED, GRPO = (
    ROOT / "recipes" / "policy" / f"{name}.yaml" for name in ("aepo", "aepo_released", "grpo")
)
# An untrained model earns from it: the share of digits below 5; correct with one among eight characters.
REWARD = """
from rltrain.reward.score import Score

def low_digits(inputs):
    shares = [sum(c in "01234" for c in text) / max(len(text), 1) for text in inputs.completions]
    return [Score(share, {"correct": float(share > 0.1)}) for share in shares]

def never(inputs):
    return [Score(0.0, {"correct": 0.0}) for _ in inputs.completions]
"""
SMALL = (
    "eval.prompts=4",
    "eval.n=2",
    "eval.k=[1]",
    "eval.at_start=false",
    "rollout.prompts=8",
    "rollout.n=4",
    "reward.workers=1",
)


@pytest.fixture
def start(random_model: str, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``start(recipe, folder, "a.b=1", reward="low_digits")`` trains under tiny_cpu; the lines of
    metrics.jsonl that are steps.
    """
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARD)

    def call(path: Path, folder: Path, *overrides: str, reward: str = "low_digits") -> list[dict[str, Any]]:
        settings = [
            f"model.path={random_model}",
            f"reward.functions=['{rewards}:{reward}']",
            *SMALL,
            *overrides,
        ]
        recipe = check(load_recipe(path, profile="tiny_cpu", overrides=settings)).recipe
        assert isinstance(recipe, OnlineRecipe)
        assert train_command(recipe, folder, []) == 0
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in records if "reward/mean" in line]

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# AEPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [AEPO, RELEASED], ids=["explicit", "rows"])
def test_aepo_lowers_its_temperature_where_the_entropy_is_above_the_target(
    recipe: Path, start: Any, tmp_path: Path
) -> None:
    # An untrained model's entropy is far above both targets: 1.2 in the first step, which knows of none
    # before it, then 0.8.
    lines = start(recipe, tmp_path / "run", "train.steps=2", "learner.updates=2")
    assert [line["control/aepo_temperature"] for line in lines] == pytest.approx([1.2, 0.8])
    assert [line["control/aepo_above_target"] for line in lines] == [0, 1]
    for line in lines:
        assert (line["rollout/completions"], line["rollout/source_tempered_completions"]) == (
            32,
            8,
        )  # a quarter of 8 prompts x 4
        assert (
            line["rollout/mismatch_abs"] < 1e-4
        )  # tempered rows, whose log-probs are of another distribution, are not in it
        assert line["control/aepo_touched"] > 0
    if recipe == RELEASED:
        assert all(line["control/aepo_replaced_rows"] >= 0 for line in lines)


@pytest.mark.parametrize(
    ("recipe", "overrides", "atol"),
    [
        pytest.param(AEPO, ["rollout.extra_samples.0.share=0.0"], 0.0, id="no tempered rows"),
        pytest.param(AEPO, ["control.0.alpha=0.0"], 1e-6, id="coefficient 0", marks=pytest.mark.slow),
        pytest.param(RELEASED, ["control.0.cap=0"], 1e-6, id="no rows replaced"),
    ],
)
def test_without_its_rows_aepo_is_grpo(
    recipe: Path, overrides: list[str], atol: float, start: Any, tmp_path: Path
) -> None:
    common = ("train.steps=2", "learner.updates=2", "learner.optimizer.lr=1e-3", "learner.optimizer.eps=1e-3")
    plain = start(recipe, tmp_path / "grpo", *common, "rollout.extra_samples=[]", "control=[]")
    lines = start(recipe, tmp_path / "aepo", *common, *overrides)
    grpo, aepo = weights(tmp_path / "grpo"), weights(tmp_path / "aepo")
    before = AutoModelForCausalLM.from_pretrained(
        check(load_recipe(tmp_path / "aepo/recipe.resolved.yaml")).recipe.model.path
    ).state_dict()
    assert max(float((grpo[name] - before[name]).abs().max()) for name in grpo) > 1e-4  # the run moved
    for name in grpo:
        torch.testing.assert_close(aepo[name], grpo[name], rtol=0, atol=atol)
    assert [line["reward/mean"] for line in lines] == [line["reward/mean"] for line in plain]


@pytest.mark.parametrize("recipe", [AEPO, RELEASED], ids=["explicit", "rows"])
def test_a_step_without_a_correct_tempered_sample_is_a_plain_step(
    recipe: Path, start: Any, tmp_path: Path
) -> None:
    lines = start(recipe, tmp_path / "run", "train.steps=1", "learner.updates=1", reward="never")
    assert (lines[0]["learner/grad_norm"], lines[0]["rollout/source_tempered_correct"]) == (0, 0)


@pytest.mark.parametrize(
    ("recipe", "updates"), [(AEPO, 2), pytest.param(RELEASED, 2, marks=pytest.mark.slow), (RELEASED, 1)]
)
def test_tempered_rows_start_with_a_ratio_of_one_and_an_advantage_of_one(
    recipe: Path, updates: int, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not the ratio to the temperature that sampled them: that one would be far from 1.
    observed: list[tuple[float, float]] = []
    call = Objective.__call__

    def watched(
        self: Objective, policy: PolicyTokens, batch: TrainBatch, totals: StepTotals
    ) -> ObjectiveShare:
        rows = (batch.source == SOURCE_TEMPERED) & batch.mask.any(1) & (batch.advantages != 0).any(1)
        old = policy.logp.detach() if batch.old_logp is None else batch.old_logp
        drift = (policy.logp.detach() - old)[rows][batch.mask[rows]]
        if len(drift) and not observed:
            observed.append(
                (float(drift.abs().max()), float((batch.advantages[rows][batch.mask[rows]] - 1).abs().max()))
            )
        return call(self, policy, batch, totals)

    monkeypatch.setattr(Objective, "__call__", watched)
    settings = ("train.steps=1", f"learner.updates={updates}", "learner.optimizer.lr=0.0")
    start(
        recipe,
        tmp_path / "run",
        *settings,
        "rollout.extra_samples.0.share=1.0",
        "rollout.extra_samples.0.high=2.0",
    )
    [(drift, advantage)] = observed
    assert drift < 1e-5 if updates > 1 else drift == 0
    assert advantage == 0


@pytest.mark.slow
def test_aepo_takes_the_same_steps_on_two_ranks(random_model: str, start: Any, tmp_path: Path) -> None:
    settings = (
        "train.steps=3",
        "learner.updates=2",
        "learner.tokens_per_micro_batch=256",
        "learner.optimizer.lr=1e-3",
    )
    single = start(AEPO, tmp_path / "one", *settings)
    rewards = f"reward.functions=['{tmp_path / 'rewards.py'}:low_digits']"
    overrides = [
        word
        for setting in (f"model.path={random_model}", rewards, *SMALL, *settings)
        for word in ("--set", setting)
    ]
    command = ["-m", "rltrain", "train", str(AEPO), "--profile", "tiny_cpu", "--run", str(tmp_path / "two")]
    run_ranks("ddp", [*command, *overrides])
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    two = [line for line in two if "reward/mean" in line]
    names = (
        "reward/mean",
        "learner/grad_norm",
        "learner/entropy_mean",
        "loss/total",
        "control/aepo_temperature",
        "rollout/source_tempered_reward",
    )
    for name in (*names, "control/aepo_correct_rows"):
        assert [line[name] for line in two] == pytest.approx(
            [line[name] for line in single], rel=1e-3, abs=1e-5
        ), name
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=2e-4)


# reference, answer, teacher ---------------------------------------------------------------------------------


def test_aapo_pairs_the_policy_with_the_reference_and_trains_on_none_of_its_rows(
    start: Any, tmp_path: Path
) -> None:
    settings = (
        "advantage=aapo",
        "loss.policy=reinforce",
        "loss.terms=[]",
        "rollout.extra_samples=[reference]",
        "learner.optimizer.lr=2e-3",
    )
    lines = start(GRPO, tmp_path / "run", *settings, "train.steps=3")
    for line in lines:
        assert (line["rollout/completions"], line["rollout/source_reference_completions"]) == (32, 32)
        assert line["learner/trained_rows"] + line["learner/idle_rows"] == 32
        assert line["rollout/mismatch_abs"] < 1e-4  # the policy's weights were back in the engine
    assert lines[0]["learner/grad_norm"] > 0


def test_grao_learns_from_the_answers_of_the_data(start: Any, tmp_path: Path) -> None:
    settings = (
        "advantage=grao",
        "loss.policy=reinforce",
        "loss.terms=[]",
        "rollout.extra_samples=[answer]",
        "learner.optimizer.lr=1e-3",
    )
    lines = start(GRPO, tmp_path / "run", *settings, "train.steps=2")
    for line in lines:
        assert (line["rollout/completions"], line["rollout/source_answer_completions"]) == (32, 8)
        assert line["rollout/source_answer_tokens"] > 8  # digits and an end token
        assert line["learner/trained_rows"] + line["learner/idle_rows"] == 40
        assert line["rollout/mismatch_abs"] < 1e-4  # the zeros in the answers' log-prob slot are not in it


@pytest.fixture(scope="module")
def teacher(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        tiny_models.make_random_model(tmp_path_factory.mktemp("model") / "teacher", tied=False, seed=9)
    )


def test_a_teacher_gives_its_own_log_probs(
    start: Any, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Any] = []
    trained = online.drop_reference_rows

    def kept(*arguments: Any) -> Any:
        batches.append(trained(*arguments))
        return batches[-1]

    monkeypatch.setattr(online, "drop_reference_rows", kept)
    start(
        GRPO,
        tmp_path / "run",
        "loss.terms=[{name: kdrl, coefficient: 0.002}]",
        f"model.teacher={teacher}",
        "train.steps=1",
    )
    [step] = batches
    rows, batch = step.rows, step.batch
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for row in (0, 17):
        prompt, completion = rows.prompts[row], rows.completions[row]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(batch.teacher_logp[row, : len(completion)], expected, rtol=0, atol=2e-5)


def test_a_teacher_that_writes_other_tokens_is_refused_before_any_weight_is_loaded(
    random_model: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<strange>"])
    tokenizer.save_pretrained(other)
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(other)
    for module in (trained_model, frozen_models):
        monkeypatch.setattr(module, "load_causal_lm", None)
    overrides = [f"model.path={random_model}", "loss.terms=[{name: kdrl, coefficient: 0.002}]"]
    for path, said in (
        (str(other), "token '<strange>' is "),
        (str(tmp_path / "nowhere"), "is no model folder"),
    ):
        recipe = check(
            load_recipe(GRPO, profile="tiny_cpu", overrides=[*overrides, f"model.teacher={path}"])
        ).recipe
        assert isinstance(recipe, OnlineRecipe)
        with pytest.raises(UserError, match=f"model.teacher .*{said}"):
            build_materials.load_inputs(recipe)


def test_a_reference_of_another_shape_is_refused(random_model: str, start: Any, tmp_path: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(random_model)
    config = small.config
    config.num_hidden_layers = 1
    config.layer_types = config.layer_types[:1]
    folder = tmp_path / "shallow"
    type(small)(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_model).save_pretrained(folder)
    settings = (
        "advantage=aapo",
        "loss.policy=reinforce",
        "loss.terms=[]",
        "rollout.extra_samples=[reference]",
        f"model.reference={folder}",
    )
    with pytest.raises(
        UserError,
        match=r"num_hidden_layers differ: \d+ and 1; set model.reference to a model of the same shape",
    ):
        start(GRPO, tmp_path / "run", *settings, "train.steps=1")
