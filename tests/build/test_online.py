"""Which passes a recipe costs: what its functions need, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.advantage import ADVANTAGES
from rltrain.build.online import build_controllers, build_objective, needed_passes
from rltrain.config.load import load_recipe
from rltrain.control import TOKEN_CONTROLS

GRPO = Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml"
NO_KL = "loss.terms=[]"


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([NO_KL], set()),  # one on-policy update: the ratio is 1 by construction
        ([], {"ref_logp"}),  # the recipe's KL term
        ([NO_KL, "learner.updates=2"], {"logp", "entropy"}),
        ([NO_KL, "learner.epochs=2"], {"logp", "entropy"}),
        ([NO_KL, "learner.updates=2", "rollout.trust_logp=true"], set()),
        ([NO_KL, "control=[tis]"], {"logp", "entropy"}),
        (["loss.terms.0.coefficient=0"], set()),  # no reference pass at coefficient 0
    ],
)
def test_a_step_computes_exactly_what_its_functions_need(overrides: list[str], passes: set[str]) -> None:
    recipe = load_recipe(GRPO, profile="tiny_cpu", overrides=overrides)
    before = ADVANTAGES.bind(recipe.advantage.name, recipe.advantage.hp).needs.union(
        *(TOKEN_CONTROLS.bind(ref.name, ref.hp).needs for ref in recipe.control)
    )
    assert (
        needed_passes(
            recipe.learner,
            recipe.rollout,
            before,
            build_objective(recipe.loss, build_controllers(recipe.loss, 1)).needs,
        )
        == passes
    )
