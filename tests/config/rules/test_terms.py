"""Recipes with changing coefficients or without a reward: which are refused, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import MethodRef, OnlineRecipe
from rltrain.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes" / "policy"


def problems(name: str, *overrides: str) -> str:
    try:
        check(load_recipe(RECIPES / f"{name}.yaml", overrides=overrides))
    except RecipeError as error:
        return "\n".join(error.problems)
    return ""


def term(text: str) -> str:
    return f"loss.terms=[{text}]"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            term("{name: entropy, coefficient: target_entropie}"),
            "no coefficient is called 'target_entropie'; did you mean 'target_entropy'?",
        ),
        (
            term("{name: entropy, coefficient: {name: target_entropy, targt: 1}}"),
            "has no hyperparameter 'targt'; did you mean 'target'?",
        ),
        (
            term("{name: entropy, coefficient: {name: target_entropy, target: high}}"),
            "target must be float, got 'high'",
        ),
        (
            term("{name: entropy, coefficient: {name: target_entropy, low: 2.0}}"),
            "low 2, start 0, high 1: each may be at most the next",
        ),
        (
            term("{name: entropy, coefficient: {name: entropy_band, rate: 0.1}}"),
            "give all three, or none to keep 0.0002",
        ),
        (
            term("{name: entropy, coefficient: {name: kl_target}}"),
            "reads the metric loss/kl, which only a term kl reports; add the term",
        ),
        (
            term("{name: entropy, coefficient: {name: entropy_band}}"),
            "reads the metric loss/clamped_entropy_nats, which only a term clamped_entropy reports",
        ),
        (
            term("{name: entropy, coefficient: epo_schedule}"),
            "the controller gives history, smoothing, which term entropy does not take",
        ),
        (
            term("{name: epo, coefficient: 0.001}"),
            "term epo gets history, smoothing from its coefficient's controller",
        ),
        (term("{name: epo, coefficient: 0.001}"), "set it to {name: epo_schedule}"),
        (
            term("{name: epo, coefficient: {name: epo_schedule, history: turn}}"),
            "history is turn, and without an environment a completion is one turn",
        ),
        (
            term("{name: entropy, coefficient: -0.1}"),
            "loss.terms.0.coefficient: got -0.1 (float); it should be greater than or equal to 0",
        ),
        (term("{name: entropy, coefficient: {target: 1}}"), "loss.terms.0.coefficient.name is missing"),
        ("data.order=gain", "data.order: no prompt order is called 'gain'; did you mean 'gain_rl'?"),
        ("data.order={name: gain_rl, sigm: 2.0}", "has no hyperparameter 'sigm'; did you mean 'sigma'?"),
        (
            "control=[kdrl_mask]",
            "control.0 kdrl_mask marks tokens for the term kdrl, which is not in loss.terms; add it or drop "
            "kdrl_mask",
        ),
        ("advantage=none", "advantage is none: loss.policy clip would learn nothing"),
        (
            "reward.functions=[{name: math_answer, weight: 0}]",
            "every weight is 0, so every completion scores 0",
        ),
    ],
)
def test_what_cannot_work_is_refused(override: str, expected: str) -> None:
    more = ("loss.terms=[]",) if override == "advantage=none" else ()
    assert expected in problems("grpo", override, *more)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "advantage=group_norm",
            "loss.policy em_ft reads no advantage, but advantage is group_norm; set advantage to none",
        ),
        (
            "reward.functions=[math_answer]",
            "loss.policy em_ft reads no reward, but reward.functions gives math_answer a weight; set weight "
            "to 0",
        ),
        ("rollout.dynamic_sampling={}", "chooses prompts by it; set it to null"),
    ],
)
def test_a_recipe_without_rewards_says_so_everywhere(override: str, expected: str) -> None:
    assert expected in problems("em_ft", override, "rollout.n=2")


def test_data_that_nobody_judged_needs_no_answers() -> None:
    assert problems("em_ft", "reward.functions=[none]") == ""


def test_a_mask_by_correctness_needs_a_verdict() -> None:
    expected = problems("kdrl_masked", "reward.functions=[{name: format, tags: [think]}]")
    assert (
        "control.0 kdrl_mask needs correctness, which none of reward.functions reports; add one of"
        in expected
    )


def test_a_coefficients_hyperparameter_is_set_by_its_own_key() -> None:
    recipe = load_recipe(
        RECIPES / "adaptive_entropy.yaml", overrides=("loss.terms.0.coefficient.target=0.4",)
    )
    assert isinstance(recipe, OnlineRecipe)
    coefficient = recipe.loss.terms[0].coefficient
    assert isinstance(coefficient, MethodRef) and coefficient.hp["target"] == 0.4


def test_a_profiles_data_keep_the_recipes_order() -> None:
    recipe = load_recipe(RECIPES / "gain_rl.yaml", profile="tiny_cpu")
    assert isinstance(recipe, OnlineRecipe)
    assert (recipe.data.train, recipe.data.order.name, recipe.data.system) == ("arithmetic", "gain_rl", None)
    plain = load_recipe(RECIPES / "grpo.yaml", profile="tiny_cpu")
    assert isinstance(plain, OnlineRecipe) and plain.data.order.name == "shuffled"
