"""Mistakes about a process reward model in a recipe, which must be found before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.errors import RecipeError

ROOT = Path(__file__).parents[3]
PRIME = ROOT / "recipes" / "policy" / "prime.yaml"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["process_reward=null"],
            "advantage prime weighs tokens by a process reward model, and the recipe trains none",
        ),
        (
            ["advantage=rloo"],
            "process_reward is set, but advantage rloo does not read it; set advantage to prime, or drop "
            "process_reward",
        ),
        (["process_reward.loss=dpo"], "choose implicit_prm_ce or nca_group"),
        (["process_reward.loss=kto"], "choose implicit_prm_ce or nca_group"),
        (["process_reward.loss=orm"], "choose implicit_prm_ce or nca_group"),
        (
            ["process_reward.loss={name: implicit_prm_ce, betta: 0.1}"],
            "process_reward.loss: preference loss 'implicit_prm_ce' has no",
        ),
        (
            ["process_reward.reference=policy", "rollout.temperature=0.8"],
            "their difference would be no log-ratio",
        ),
        (["process_reward.updates=300"], "process_reward.updates is 300 but rollout.prompts is 256"),
        (
            ["reward.functions=[{name: format, tags: [think]}]"],
            "process_reward learns which completions are right",
        ),
        (["rollout.dynamic_sampling.accuracy=[0.3, 0.4]"], "no number of right ones among rollout.n 4"),
        (["process_reward.optimiser.lr=1"], "did you mean 'process_reward.optimizer'?"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        check(load_recipe(PRIME, overrides=overrides))
    assert expected in str(error.value)


def test_a_bare_loss_gains_hyperparameters() -> None:
    recipe = check(
        load_recipe(PRIME, overrides=["process_reward.loss=implicit_prm_ce", "process_reward.loss.beta=0.1"])
    ).recipe
    assert recipe.process_reward.loss.hp == {"beta": 0.1}


def test_a_profile_gives_the_second_model_a_learning_rate_and_makes_none_where_there_is_none() -> None:
    # at the paper's 1e-6 a model of a million parameters does not change, and the run would measure GRPO
    prime, grpo = (
        load_recipe(ROOT / f"recipes/policy/{name}.yaml", profile="tiny_cpu") for name in ("prime", "grpo")
    )
    assert isinstance(prime, OnlineRecipe) and isinstance(grpo, OnlineRecipe)
    assert (
        prime.process_reward is not None and prime.process_reward.optimizer.lr >= prime.learner.optimizer.lr
    )
    # values from the recipe itself
    assert prime.process_reward.loss.hp == {"beta": 0.05}
    assert prime.process_reward.optimizer.max_grad_norm == 10.0
    assert grpo.process_reward is None
    for path in (ROOT / "recipes").rglob("*.yaml"):
        if path.parent.name in ("policy", "preference"):
            load_recipe(path, profile="tiny_cpu")
