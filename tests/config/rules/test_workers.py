"""What is refused of ``rollout.workers`` before anything is loaded, and how soon a worker is missed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.build.pool import ALIVE_SHARE, make_connector
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError
from rltrain.rollout.worker.flags import worker_settings

RECIPES = Path(__file__).parents[3] / "recipes/policy"
SERVER = "rollout.engine=vllm_server"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("rollout.workers={count: 2}",), "rollout.engine is transformers, which has none"),
        ((SERVER, "rollout.workers={}"), "names no workers; give count"),
        ((SERVER, "rollout.workers={count: 2, join: true}"), "names count and join; give count"),
        ((SERVER, "rollout.workers={urls: [host:80]}"), "rollout.workers.urls has 'host:80'"),
        ((SERVER, "rollout.workers={urls: [http://a:1, http://a:1]}"), "names http://a:1 twice"),
        ((SERVER, "rollout.workers={router: http://a:1}"), "name the address of every one in admin"),
        (
            (SERVER, "rollout.workers={count: 1, admin: [http://a:1]}"),
            "workers.router, which is null",
        ),
        (
            (SERVER, "rollout.workers={router: http://a:1, admin: [http://a:1]}"),
            "name the workers' own addresses",
        ),
        ((SERVER, "rollout.workers={router: a, admin: [http://a:1]}"), "rollout.workers.router has 'a'"),
        (
            (SERVER, "rollout.workers={router: http://r:1, admin: [http://a:1, http://a:1]}"),
            "rollout.workers.admin names http://a:1 twice",
        ),
        (
            (SERVER, "rollout.workers={count: 2}", "rollout.server.url=http://a:1"),
            "move it to rollout.workers.urls",
        ),
        (
            (SERVER, "rollout.workers={count: 2, patience_seconds: 60}", "train.deadline_seconds=50"),
            "the deadline would end the run before it could be saved",
        ),
        (
            (SERVER, "rollout.workers={count: 2}", "rollout.server.authority=ca.pem"),
            "rollout.server.authority checks the certificate",
        ),
    ],
)
def test_what_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check(load_recipe(RECIPES / "grpo.yaml", profile="tiny_cpu", overrides=overrides))


@pytest.mark.parametrize(
    "workers",
    [
        "{count: 2}",
        "{urls: [http://a:1, unix:/b]}",
        "{join: true}",
        "{urls: [http://a:1], join: true}",
        "{router: http://r:1, admin: [http://a:1, http://b:1]}",
    ],
)
def test_what_is_accepted(workers: str) -> None:
    overrides = (SERVER, f"rollout.workers={workers}")
    recipe = check(load_recipe(RECIPES / "grpo.yaml", profile="tiny_cpu", overrides=overrides)).recipe
    assert recipe.rollout.workers is not None


def test_the_policys_workers_are_never_lent_to_the_reference_model() -> None:
    overrides = (SERVER, "rollout.workers={count: 2}")
    with pytest.raises(
        RecipeError, match=r"never lent to another model; name others in rollout\.reference_w"
    ):
        check(load_recipe(RECIPES / "aapo.yaml", profile="tiny_cpu", overrides=overrides))
    others = (*overrides, "rollout.reference_workers={urls: [http://b:1]}")
    check(load_recipe(RECIPES / "aapo.yaml", profile="tiny_cpu", overrides=others))


@pytest.mark.parametrize(
    ("recipe", "workers", "others", "words"),
    [
        ("grpo", "{count: 1}", "{count: 1}", "nothing samples from it"),
        ("aapo", "null", "{count: 1}", "stand beside the policy's rollout.workers"),
        ("aapo", "{count: 1}", "{}", "rollout.reference_workers names no workers"),
        ("aapo", "{urls: [http://a:1]}", "{urls: [http://a:1]}", "which rollout.workers names too"),
        ("aapo", "{join: true}", "{join: true}", "give rollout.reference_workers another port"),
    ],
)
def test_what_is_refused_of_the_references_workers(
    recipe: str, workers: str, others: str, words: str
) -> None:
    overrides = (SERVER, f"rollout.workers={workers}", f"rollout.reference_workers={others}")
    with pytest.raises(RecipeError, match=words):
        check(load_recipe(RECIPES / f"{recipe}.yaml", profile="tiny_cpu", overrides=overrides))


def test_a_worker_that_hangs_is_noticed_in_time() -> None:
    """Twice the call's deadline and the pause before it are twice ``liveness_seconds``: 10 s by default."""
    recipe = load_recipe(RECIPES / "grpo.yaml", profile="tiny_cpu", overrides=(SERVER,))
    rollout = recipe.rollout
    settings = worker_settings(recipe.model, recipe.data, rollout, "float32", on_gpu=False)
    client = make_connector(rollout, settings).connect("http://a:1", "a-token-of-enough-characters")
    pause = rollout.server.liveness_seconds * (1 - ALIVE_SHARE)
    assert client.seconds.alive > 0 and pause > 0
    assert 2 * (client.seconds.alive + pause) == pytest.approx(10.0)
    client.close()
