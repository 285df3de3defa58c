"""Recipes that learn from judged completions: how their kind is recognised, their schema and their plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rltrain.config.fragments import check_fragment
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.config.plan import plan
from rltrain.config.rules import check
from rltrain.config.schema import OfflineRecipe, OnlineRecipe
from rltrain.errors import RecipeError

MINIMAL = """\
model: {path: tiny}
data: {train: arithmetic_pairs}
loss: {preference: dpo}
learner: {optimizer: {lr: 1e-4}}
train: {examples: 32}
"""
PROFILE = """\
model: {path: small}
data: {train: arithmetic}
rollout: {n: 2}
learner: {layout: padded}
train: {steps: 7}
report: {transcripts: 0}
offline:
  data: {max_prompt_tokens: 9}
  train: {steps: 3}
"""


@pytest.fixture
def offline(write: Callable[..., Path]) -> Path:
    return write("offline.yaml", MINIMAL)


def test_the_kind_follows_from_the_loss_or_is_said(
    offline: Path, recipe: Path, write: Callable[..., Path]
) -> None:
    assert isinstance(load_recipe(offline), OfflineRecipe) and isinstance(load_recipe(recipe), OnlineRecipe)
    with pytest.raises(RecipeError, match="loss is missing; expected a section with preference"):
        load_recipe(write("said.yaml", "kind: offline\n" + MINIMAL.replace("loss: {preference: dpo}\n", "")))


def test_supervised_fine_tuning_names_its_kind_and_may_leave_its_loss_out(write: Callable[..., Path]) -> None:
    without_loss = MINIMAL.replace("loss: {preference: dpo}\n", "")
    recipe = load_recipe(write("sft.yaml", "kind: sft\n" + without_loss))
    assert isinstance(recipe, OfflineRecipe) and recipe.loss.preference.name == "nll"
    assert check(recipe).recipe == recipe
    assert load_recipe(write("resolved.yaml", resolved_yaml(recipe))) == recipe
    with pytest.raises(RecipeError, match=r"kind is sft, whose loss is nll, but .* is dpo.*kind: offline"):
        check(load_recipe(write("dpo.yaml", "kind: sft\n" + MINIMAL)))


def test_the_resolved_form_loads_back_as_it_is(offline: Path, write: Callable[..., Path]) -> None:
    loaded = load_recipe(offline, overrides=["loss.preference.beta=0.3"])
    assert isinstance(loaded, OfflineRecipe) and loaded.loss.preference.hp == {"beta": 0.3}
    assert load_recipe(write("resolved.yaml", resolved_yaml(loaded))) == loaded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.epochs=2", "unknown key learner.epochs; did you mean train.epochs?"),
        ("data.max_prompts=2", "unknown key data.max_prompts"),
        ("data.too_long=trim", "data.too_long: got 'trim', expected 'cut' or 'drop'"),
        ("reward.functions=[exact]", "unknown key reward"),
        ("train.examples=1", "train.examples: got 1"),
    ],
)
def test_unknown_keys_and_values_are_refused_with_a_suggestion(
    offline: Path, override: str, expected: str
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(offline, overrides=[override])
    assert expected in str(error.value)


def test_a_profile_has_a_section_of_its_own_for_them(
    offline: Path, recipe: Path, write: Callable[..., Path]
) -> None:
    profile = write("profiles/p.yaml", PROFILE)
    check_fragment(profile)
    judged = load_recipe(offline, profile=str(profile))
    sampled = load_recipe(recipe, profile=str(profile))
    assert isinstance(judged, OfflineRecipe) and isinstance(sampled, OnlineRecipe)
    assert (judged.model.path, judged.learner.layout) == ("small", "padded")  # shared
    assert (judged.data.train, judged.data.max_prompt_tokens, judged.train.steps) == (
        "arithmetic_pairs",
        9,
        3,
    )
    assert (sampled.rollout.n, sampled.train.steps) == (2, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "offline:\n  loss: {preference: kto}\n",
            "p.yaml:2: offline.loss.preference: below offline a profile replaces data, learner",
        ),
        (
            "offline:\n  train:\n    exampels: 3\n",
            "p.yaml:3: unknown key train.exampels; did you mean 'train.examples'?",
        ),
    ],
)
def test_that_section_is_held_to_the_schema_with_its_lines(
    write: Callable[..., Path], text: str, expected: str
) -> None:
    with pytest.raises(RecipeError) as error:
        check_fragment(write("profiles/p.yaml", text))
    assert expected in str(error.value)


def test_the_plan_of_a_pairwise_and_of_a_single_loss(offline: Path) -> None:
    lines = {
        line.name: line
        for line in plan(
            load_recipe(offline, overrides=["train.epochs=2", "learner.tokens_per_micro_batch=5000"])
        )
    }
    assert lines["data: longest example"].value == "2,048"  # 2 x (512 + 512)
    assert lines["learner: longest pairs per micro-batch"].value == "2"  # 5000 // 2048
    assert lines["learner: updates in all"].value == "2 x examples / 32"
    assert lines["frozen models: log-probs"].value == "ref_logp"
    lines = {
        line.name: line
        for line in plan(
            load_recipe(offline, overrides=["loss.preference=kto", "train.steps=9", "reference.cache=null"])
        )
    }
    assert lines["frozen models: log-probs"][1:] == ("ref_logp mismatched", "computed in every run")
    assert (lines["data: longest example"].value, lines["learner: updates in all"].value) == ("1,024", "9")
    lines = {
        line.name: line
        for line in plan(load_recipe(offline, overrides=["loss.preference=dpo_reference_free"]))
    }
    assert lines["frozen models: log-probs"].value == "none"


def test_what_changes_nothing_is_warned_of(offline: Path) -> None:
    few = check(
        load_recipe(
            offline, overrides=["loss.preference=kto", "train.examples=4", "train.steps=5", "train.epochs=2"]
        )
    ).warnings
    assert any("train.epochs 2 is not read" in line for line in few) and any(
        "set at least 8" in line for line in few
    )
    assert check(load_recipe(offline)).warnings == ()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["loss.preference=kto", "eval.gamma=0.7"],
            "eval.gamma is 0.7, but loss.preference kto learns from single completions",
        ),
        (["eval.samples=8"], "eval.samples is 8, but data.eval is null"),
        (
            ["loss.preference=bradley_terry", "data.eval=arithmetic_pairs", "eval.samples=8"],
            "trains a scalar head, which writes no text",
        ),
    ],
)
def test_evaluations_that_cannot_be_made_are_refused(offline: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check(load_recipe(offline, overrides=overrides))


def test_the_plan_says_what_the_policy_will_write(offline: Path) -> None:
    lines = plan(
        check(load_recipe(offline, overrides=["data.eval=arithmetic_pairs", "eval.samples=8"])).recipe
    )
    assert [line.value for line in lines if line.name == "eval: completions written"] == ["8"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss={preference: kto, degree: {}}", "kto learns from single completions; leave it out"),
        ("loss={preference: bradley_terry, degree: {}}", "bradley_terry trains a scalar head; leave it out"),
        ("eval.spectrum=true", "on held-out examples, but data.eval is null; leave it out"),
    ],
)
def test_a_head_and_a_spectrum_without_what_they_need_are_refused(
    offline: Path, override: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check(load_recipe(offline, overrides=[override]))


def test_a_degree_head_counts_a_third_row_for_each_pair(offline: Path) -> None:
    recipe = load_recipe(offline, overrides=["loss.degree={levels: 3}"])
    assert isinstance(recipe, OfflineRecipe) and recipe.loss.degree is not None
    assert "and a degraded one" in str(plan(check(recipe).recipe))
    small = load_recipe(offline, overrides=["loss.degree={}", "learner.tokens_per_micro_batch=2048"])
    with pytest.raises(RecipeError, match=r"can take 3 x \(data.max_prompt_tokens 512"):
        check(small)
