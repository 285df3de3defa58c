"""What is refused of ``rollout.schedule: {bounded: ...}`` before anything is loaded, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import Bounded
from rltrain.errors import RecipeError

RECIPES = Path(__file__).parents[3] / "recipes"
KEYS = (
    "rollout.engine=vllm_server",
    "rollout.workers={count: 2}",
    "rollout.schedule={bounded: {versions: 2}}",
    "control=[tis]",
)


def load(recipe: str, *keys: str) -> object:
    path = RECIPES / f"{recipe}.yaml"
    return check(load_recipe(path, profile="tiny_cpu", overrides=[*KEYS, *keys]))


def test_the_defaults() -> None:
    checked = check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=KEYS))
    rollout = checked.recipe.rollout  # pyright: ignore[reportAttributeAccessIssue]
    assert rollout.bound == Bounded(versions=2, update="in_flight", when_stale="wait")
    assert rollout.lag == 0 and rollout.oldest == 2
    assert not [warning for warning in checked.warnings if "schedule" in warning]


@pytest.mark.parametrize(
    ("recipe", "keys", "words"),
    [
        ("policy/grpo", ["rollout.engine=transformers", "rollout.workers=null"], "only workers sample while"),
        ("policy/grpo", ["rollout.workers=null"], "set rollout.engine to vllm_server and rollout.workers"),
        (
            "policy/grpo",
            ["rollout.workers={router: http://r:1, admin: [http://a:1]}"],
            "nobody says which worker behind a router",
        ),
        ("policy/dapo", [], "rollout.dynamic_sampling: a round is drawn when all of the one before"),
        ("policy/aepo", [], "rollout.extra_samples: their rows are sampled for the groups"),
        ("policy/epo_calculator", [], "rollout.environment: the turns of an episode"),
        ("policy/grpo", ["model.adapter={rank: 8}"], "model.adapter: a request names the adapter"),
        (
            "policy/grpo",
            ["reward.functions=[{name: reward_model, path: a/b}]"],
            "reward_model: it needs the learner's device while rollout.schedule bounded",
        ),
        ("policy/grpo", ["journal.keep=nothing"], "journal.keep is nothing; set it to all or resume"),
        ("policy/grpo", ["rollout.schedule={bounded: {versions: -1}}"], "greater than or equal to 0"),
        ("policy/grpo", ["rollout.schedule={bounded: {versions: 1, update: keep}}"], "'in_flight', 'abort'"),
    ],
)
def test_what_cannot_act_is_refused(recipe: str, keys: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(recipe, *keys)
    assert words in " ".join(error.value.problems)


def test_pairs_are_refused() -> None:
    recipe = load_recipe(RECIPES / "preference/inpo_online.yaml", profile="tiny_cpu", overrides=KEYS[:-1])
    with pytest.raises(RecipeError, match="bounded: pairs are compared with the policy at the start"):
        check(recipe)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8}))
    with pytest.raises(RecipeError) as error:
        load("policy/grpo", f"model.path={tmp_path}")
    assert "rollout.schedule bounded: model.path" in " ".join(error.value.problems)


def test_a_bound_that_nothing_corrects_is_warned_of() -> None:
    checked = check(load_recipe(RECIPES / "policy/grpo.yaml", profile="tiny_cpu", overrides=KEYS[:-1]))
    assert [text for text in checked.warnings if text.startswith("rollout.schedule bounded 2")]
