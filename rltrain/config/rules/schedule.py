"""Rules about ``rollout.schedule``: when samples are those of earlier weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.model_config import count_experts
from rltrain.config.schema import AnyRecipe, OnlineRecipe, SampledRecipe
from rltrain.control import TOKEN_CONTROLS
from rltrain.needs import ROLLOUT_LOGP

__all__ = ["schedule_problems", "schedule_warnings"]


def schedule_problems(recipe: AnyRecipe) -> Iterator[str]:
    """What a lag cannot be combined with, each with the reason."""
    if not isinstance(recipe, SampledRecipe) or recipe.rollout.lag == 0:
        return
    if not isinstance(recipe, OnlineRecipe):
        yield (
            "rollout.schedule lag: pairs are compared with the policy at the start of their step, which "
            "would not be the one that sampled them; set rollout.schedule to sync"
        )
    if recipe.journal.keep == "nothing":
        yield (
            "rollout.schedule lag: a resumed run needs what was sampled ahead by weights that are gone, and "
            "journal.keep is nothing; set it to all or resume"
        )
    experts = count_experts(recipe.model.path, recipe.model.revision)
    if experts:
        yield (
            f"rollout.schedule lag: model.path {recipe.model.path} has {experts} experts, and which of them "
            "a token went to is not kept beside its log-prob: with later weights the router chooses others, "
            "and the ratio would compare two networks; set rollout.schedule to sync"
        )


def schedule_warnings(recipe: AnyRecipe) -> Iterator[str]:
    if not isinstance(recipe, OnlineRecipe) or recipe.rollout.lag == 0 or recipe.rollout.trust_logp:
        return
    corrects = any(ROLLOUT_LOGP in TOKEN_CONTROLS.spec(ref.name).needs_with(ref.hp) for ref in recipe.control)
    if not corrects:
        yield (
            f"rollout.schedule lag {recipe.rollout.lag}: the samples are those of earlier weights, and "
            "nothing corrects for it; add one of tis, mis, geometric_rejection to control, or set "
            "rollout.trust_logp to true, with which the ratio is that to the policy that sampled"
        )
