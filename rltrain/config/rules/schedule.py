"""Rules about ``rollout.schedule``: when samples are those of earlier weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.model_config import count_experts
from rltrain.config.schema import AnyRecipe, OnlineRecipe, SampledRecipe
from rltrain.control import TOKEN_CONTROLS
from rltrain.needs import ROLLOUT_LOGP

__all__ = ["schedule_problems", "schedule_warnings"]


def schedule_problems(recipe: AnyRecipe) -> Iterator[str]:
    """What a lag or a bound cannot be combined with, each with the reason."""
    if not isinstance(recipe, SampledRecipe) or recipe.rollout.schedule == "sync":
        return
    name = "lag" if recipe.rollout.bound is None else "bounded"
    if name == "bounded":
        yield from _bounded_problems(recipe)
    elif recipe.rollout.lag == 0:
        return
    if not isinstance(recipe, OnlineRecipe):
        yield (
            f"rollout.schedule {name}: pairs are compared with the policy at the start of their step, which "
            "would not be the one that sampled them; set rollout.schedule to sync"
        )
    if recipe.journal.keep == "nothing":
        yield (
            f"rollout.schedule {name}: a resumed run needs what was sampled ahead by weights that are gone, "
            "and journal.keep is nothing; set it to all or resume"
        )
    experts = count_experts(recipe.model.path, recipe.model.revision)
    if experts:
        yield (
            f"rollout.schedule {name}: model.path {recipe.model.path} has {experts} experts, and which of "
            "them a token went to is not kept beside its log-prob: with later weights the router chooses "
            "others, and the ratio would compare two networks; set rollout.schedule to sync"
        )


def _bounded_problems(recipe: SampledRecipe) -> Iterator[str]:
    """What cannot act while workers sample without a break."""
    rollout = recipe.rollout
    reasons = {
        "rollout.engine": (
            rollout.engine != "vllm_server" or rollout.workers is None,
            "only workers sample while the learner has its devices; set rollout.engine to vllm_server and "
            "rollout.workers",
        ),
        "rollout.workers.router": (
            rollout.workers is not None and rollout.workers.router is not None,
            "nobody says which worker behind a router has a request, so that nobody knows the weights "
            "it goes on with; name the workers in rollout.workers.urls",
        ),
        "rollout.dynamic_sampling": (
            rollout.dynamic_sampling is not None,
            "a round is drawn when all of the one before is graded, and there are no rounds; set it to null, "
            "or use {lag: k}",
        ),
        "rollout.extra_samples": (
            bool(rollout.extra_samples),
            "their rows are sampled for the groups that a step trains on, which are known when it begins; "
            "leave them out, or use {lag: k}",
        ),
        "rollout.environment": (
            rollout.environment is not None,
            "the turns of an episode are requests of one version; use {lag: k}",
        ),
        "model.adapter": (
            recipe.model.adapter is not None,
            "a request names the adapter that it is sampled with from its first token to its last; use "
            "{lag: k}, or train all weights",
        ),
    }
    for key, (is_refused, reason) in reasons.items():
        if is_refused:
            yield f"rollout.schedule bounded and {key}: {reason}"


def schedule_warnings(recipe: AnyRecipe) -> Iterator[str]:
    if not isinstance(recipe, OnlineRecipe) or recipe.rollout.oldest == 0 or recipe.rollout.trust_logp:
        return
    corrects = any(ROLLOUT_LOGP in TOKEN_CONTROLS.spec(ref.name).needs_with(ref.hp) for ref in recipe.control)
    name = "lag" if recipe.rollout.bound is None else "bounded"
    if not corrects:
        yield (
            f"rollout.schedule {name} {recipe.rollout.oldest}: the samples are those of earlier weights, and "
            "nothing corrects for it; add one of tis, mis, geometric_rejection to control, or set "
            "rollout.trust_logp to true, with which the ratio is that to the policy that sampled"
        )
