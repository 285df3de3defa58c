"""A whole run on judged completions: it learns, it resumes bit for bit, it says what the data are,
and refuses what it cannot use.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rltrain.build import frozen_examples
from rltrain.cli.doctor import doctor_command
from rltrain.cli.evaluate import eval_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OfflineRecipe
from rltrain.errors import RecipeError, UserError
from rltrain.learner.frozen_models import frozen_model
from rltrain.train import offline
from rltrain.train.saving import STOPPED
from support.resumed_runs import at_call, differing, killed_in, lines

ROOT = Path(__file__).parents[2]
# What a resumed run could forget: momentum, a schedule in its middle, an order that begins its second epoch
# after step 3 (26 examples, 8 per step), evaluations; for KTO the other prompts' completions of each step.
SETTINGS = (
    "train.examples=8",
    "train.steps=6",
    "data.max_examples=26",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "eval.every=3",
    "eval.examples=8",
    "learner.optimizer.lr=2e-3",
    "learner.optimizer.schedule=cosine",
    "learner.optimizer.warmup_steps=2",
    "learner.tokens_per_micro_batch=100",
)


def recipe_of(name: str, *overrides: str) -> OfflineRecipe:
    """name: below recipes/preference, or a path below recipes."""
    path = ROOT / "recipes" / f"{name if '/' in name else f'preference/{name}'}.yaml"
    recipe = check(load_recipe(path, profile="tiny_cpu", overrides=overrides)).recipe
    assert isinstance(recipe, OfflineRecipe)
    return recipe


@pytest.fixture
def start(random_model: str, tmp_path: Path) -> Callable[..., int]:
    """``start(folder, "dpo", "a.b=1")`` runs ``rltrain train`` in this process."""

    def call(folder: Path, name: str, *overrides: str, resume: str = "auto") -> int:
        settings = [
            f"model.path={random_model}",
            f"reference.cache={tmp_path / 'cache'}",
            *SETTINGS,
            *overrides,
        ]
        return train_command(recipe_of(name, *settings), folder, [], resume)

    return call


def assert_same_run(left: Path, right: Path, step: int = 6) -> None:
    assert lines(left) == lines(right)
    state = f"checkpoints/step-{step}/training/optimizer.safetensors"
    saved = [state] if (left / state).exists() else []  # a sharded checkpoint has parts, whose order may vary
    assert not differing(left, right, "model/model.safetensors", *saved)
    assert (left / "model/README.md").read_bytes() == (right / "model/README.md").read_bytes()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", ()),
        ("kto", ()),
        ("spo", ()),
        ("dpo", ("learner.optimizer.name=rmsprop",)),
        ("spo", ("learner.optimizer.name=muon", "checkpoint.format=sharded")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    name: str, settings: tuple[str, ...], start: Any, tmp_path: Path
) -> None:
    assert start(tmp_path / "whole", name, *settings) == 0
    killed_in(5, offline, "report_step", lambda: start(tmp_path / "resumed", name, *settings))
    assert lines(tmp_path / "resumed")[-1]["step"] == 4  # more than the checkpoint of step 3 knows of
    assert start(tmp_path / "resumed", name, *settings) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert lines(tmp_path / "whole")[0]["eval/loss"] == pytest.approx(
        {"dpo": math.log(2), "kto": 0.5, "spo": math.log(2)}[name], abs=1e-6
    )


def test_a_resumed_run_needs_no_reference_while_its_log_probs_are_on_disk(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str | None] = []

    def open_model(path: str | None, *others: Any) -> Any:
        opened.append(path)
        return frozen_model(path, *others)

    monkeypatch.setattr(frozen_examples, "frozen_model", open_model)
    short = ("dpo", "train.steps=2", "checkpoint.every=1", "eval.every=0", "eval.at_start=false")
    for run, needed in (("kept", []), ("lost", [None])):
        killed_in(2, offline, "report_step", lambda run=run: start(tmp_path / run, *short))
        assert opened == []  # the learner was the reference
        if run == "lost":
            shutil.rmtree(tmp_path / "cache")
        assert start(tmp_path / run, *short) == 0
        assert opened == needed
    assert not differing(tmp_path / "kept", tmp_path / "lost", "model/model.safetensors")


def test_sigterm_saves_and_exits_with_3(start: Any, tmp_path: Path) -> None:
    with at_call(2, offline, "report_step", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert start(tmp_path / "run", "dpo") == STOPPED == 3
    assert (tmp_path / "run/checkpoints/step-2").is_dir() and not (tmp_path / "run/model").exists()
    assert start(tmp_path / "run", "dpo") == 0
    assert start(tmp_path / "whole", "dpo") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_learns_what_the_pairs_say(start: Any, tmp_path: Path) -> None:
    # A random model cannot add, but wrong answers have other digits: 40 steps teach it more than a coin.
    settings = (
        "train.steps=40",
        "train.examples=32",
        "data.max_examples=400",
        "eval.examples=128",
        "checkpoint.every=0",
        "eval.every=0",
    )
    assert start(tmp_path / "run", "dpo", *settings, "learner.optimizer.warmup_steps=0") == 0
    first, *_, last = (line for line in lines(tmp_path / "run") if "eval/accuracy" in line)
    assert first["eval/accuracy"] == 0.5 and first["eval/margin"] == 0  # its own reference: all ties
    assert last["eval/accuracy_low"] > 0.5 and last["eval/loss"] < first["eval/loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    card = (tmp_path / "run/model/README.md").read_text()
    assert (
        "trained with dpo" in card
        and "| examples per step | 32 |" in card
        and "eval/accuracy (before) | 0.5" in card
    )


def test_what_the_policy_writes_itself_is_measured_and_changes_no_weight(start: Any, tmp_path: Path) -> None:
    assert start(tmp_path / "plain", "dpo") == 0
    assert start(tmp_path / "sampled", "dpo", "eval.samples=4") == 0
    assert not differing(tmp_path / "plain", tmp_path / "sampled", "model/model.safetensors")
    evaluations = [line for line in lines(tmp_path / "sampled") if "eval/sampled_entropy" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]  # with every evaluation
    assert all(0 < line["eval/sampled_entropy_low"] <= line["eval/sampled_entropy"] for line in evaluations)
    assert all(
        1 <= line["eval/sampled_tokens"] <= 8 for line in evaluations
    )  # the profile's data.max_completion_tokens
    assert not any("eval/sampled_entropy" in line for line in lines(tmp_path / "plain"))


def test_a_second_run_finds_the_reference_and_eval_agrees(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "one", "dpo") == 0
    first = capsys.readouterr().out
    assert "computing 52" in first and "training pairs: 26" in first
    assert start(tmp_path / "two", "dpo", "learner.optimizer.lr=1e-3") == 0
    assert f"from {tmp_path / 'cache'}" in capsys.readouterr().out
    model = str(tmp_path / "one/model")
    settings = [
        f"model.path={json.loads(json.dumps(_start_of(tmp_path / 'one')))}",
        *SETTINGS,
        f"reference.cache={tmp_path / 'cache'}",
    ]
    assert eval_command(model, recipe_of("dpo", *settings), tmp_path / "eval.json") == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    last = lines(tmp_path / "one")[-1]
    for name in ("eval/accuracy", "eval/margin", "eval/loss"):
        assert results[name] == pytest.approx(last[name], abs=1e-5)


def _start_of(run: Path) -> str:
    loaded = load_recipe(run / "recipe.resolved.yaml")
    return loaded.model.path


def test_a_longer_run_goes_on_and_another_recipe_is_refused(start: Any, tmp_path: Path) -> None:
    constant = (
        "learner.optimizer.schedule=constant",
        "checkpoint.every=2",
        "train.steps=null",
        "eval.every=0",
    )
    assert start(tmp_path / "run", "dpo", *constant, "train.epochs=1") == 0  # 26 / 8, rounded up
    assert lines(tmp_path / "run")[-1]["step"] == 4
    with pytest.raises(UserError, match=r"loss\.preference\.beta: 0\.1 -> 0\.2"):
        start(tmp_path / "run", "dpo", *constant, "train.epochs=1", "loss.preference.beta=0.2")
    assert start(tmp_path / "run", "dpo", *constant, "train.epochs=2") == 0
    assert lines(tmp_path / "run")[-1]["step"] == 7 and (tmp_path / "run/model-epoch-1").is_dir()


def test_every_example_is_seen_once_per_epoch(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []
    following = offline.ExampleOrder.next
    monkeypatch.setattr(offline.ExampleOrder, "next", lambda self: taken.append(following(self)) or taken[-1])
    assert start(tmp_path / "run", "dpo", "data.max_examples=16", "train.steps=4") == 0
    assert sorted(taken[0] + taken[1]) == sorted(taken[2] + taken[3]) == list(range(16))


# what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dpo", "loss.preference.betta=1", "no hyperparameter 'betta'; did you mean 'beta'"),
        ("dpo", "loss.preference={name: dppo}", "no preference loss is called 'dppo'; did you mean 'dpo'"),
        ("dpo", "train.exampels=3", "unknown key train.exampels; did you mean 'train.examples'"),
        ("dpo", "rollout.n=3", "unknown key rollout"),
        (
            "dpo",
            "learner.tokens_per_micro_batch=47",
            r"2 x \(data.max_prompt_tokens 16 \+ data.max_completion_tokens 8\) = 48",
        ),
        ("dpo", "loss.preference={name: mmpo}", "gamma has no default"),
        ("dpo", "model.previous=x", "reads no previous iterate"),
        ("dpo", "data.divide_margins_by=std", "reads no margins"),
        ("dpo", "data.columns={completion: answer}", "compares two completions"),
        ("dpo", "loss.preference={name: dpo_reference_free}", None),
    ],
)
def test_the_recipe_is_checked_before_anything_is_loaded(
    name: str, override: str, message: str | None
) -> None:
    if message is None:
        assert recipe_of(name, override).loss.preference.name == "dpo_reference_free"
        with pytest.raises(RecipeError, match="has no reference model"):
            recipe_of(name, override, "model.reference=x")
        return
    with pytest.raises(RecipeError, match=message):
        recipe_of(name, override)


def test_small_data_and_overlap_are_said_in_one_line(start: Any, tmp_path: Path, random_model: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": str(n), "chosen": "a", "rejected": "b"}) + "\n" for n in range(4))
    )
    file = f"data={{train: {rows}, max_prompt_tokens: 16, max_completion_tokens: 8}}"
    with pytest.raises(
        UserError,
        match=r"a step takes 8 different examples and the training set has 4; lower train\.examples",
    ):
        start(tmp_path / "run", "dpo", file, "data.max_examples=null")
    with pytest.raises(UserError, match="every prompt of the 4 training examples is also held out"):
        start(tmp_path / "run", "dpo", file, f"data.eval={rows}", "data.max_examples=null")
    with pytest.raises(
        UserError, match=r"data.max_prompt_tokens 1000 \+ data.max_completion_tokens 8 = 1008 tokens"
    ):
        start(tmp_path / "run", "dpo", "data.max_prompt_tokens=1000", "learner.tokens_per_micro_batch=9999")
    with pytest.raises(UserError, match="neither: it learns from judged completions"):
        doctor_command(recipe_of("dpo", f"model.path={random_model}"), 2)


def test_unbalanced_classes_are_warned_of_with_the_remedy(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": str(n), "completion": "a", "label": n % 4 == 0}) + "\n" for n in range(32)
        )
    )
    file = f"data={{train: {rows}, max_prompt_tokens: 16, max_completion_tokens: 8}}"
    assert start(tmp_path / "run", "kto", file, "train.steps=1", "checkpoint.every=0") == 0
    printed = capsys.readouterr().out
    # 8 desirable, 24 undesirable: the weighted ratio 8/24 must reach 1 to 1.5, so the weight is 3 to 4.5.
    assert "training completions: 32" in printed and "set weight_desirable between 3 and 4.5" in printed


def test_one_prompt_for_all_leaves_kto_nothing_to_compare_with(start: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": "q", "completion": str(n), "label": n % 2 == 0}) + "\n" for n in range(16)
        )
    )
    with pytest.raises(UserError, match="cannot all be paired with another prompt's completion"):
        start(
            tmp_path / "run",
            "kto",
            f"data={{train: {rows}, max_prompt_tokens: 16, max_completion_tokens: 8}}",
        )


# every recipe -----------------------------------------------------------------------------------------------

FILES = [
    path
    for folder in ("preference", "process_reward", "supervised")
    for path in sorted((ROOT / "recipes" / folder).glob("*.yaml"))
]
RECIPES = [
    f"{path.parent.name}/{path.stem}" for path in FILES if isinstance(load_recipe(path), OfflineRecipe)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_finite_step_that_moves_the_weights(
    name: str, start: Any, tmp_path: Path
) -> None:
    if name.endswith("/qlora_dpo"):
        pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed (pip install rltrain[qlora])"
        )
    settings = (
        "train.steps=2",
        "data.max_examples=16",
        "checkpoint.every=0",
        "eval.every=0",
        "learner.optimizer.schedule=constant",
        "learner.optimizer.min_lr_ratio=0",
    )
    assert start(tmp_path / "run", name, *settings, "learner.optimizer.warmup_steps=0") == 0
    before, first, second, after = lines(tmp_path / "run")
    assert all(
        math.isfinite(line["loss/total"]) and line["learner/grad_norm"] > 0 for line in (first, second)
    )
    assert (second["learner/version"], after["step"]) == (2, 2)
    assert after["eval/loss"] != before["eval/loss"] and 0 <= after.get("eval/accuracy", 0) <= 1
