"""Rules about the process reward model of an online recipe.

Imports no torch. Called by ``config/check.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.advantage import ADVANTAGES
from rltrain.config.schema import OnlineRecipe, ProcessReward
from rltrain.loss.preference import PREFERENCE_LOSSES, STATISTICS
from rltrain.registry import MethodSpec

_KEY = "process_reward"
_GIVEN = frozenset({"label", "ref_logp"})  # what a step can give a loss


def process_reward_problems(recipe: OnlineRecipe, reporting: frozenset[str]) -> Iterator[str]:
    """reporting: the reward functions of ours that say what is right."""
    settings, users = recipe.process_reward, _users()
    wants = "process_reward" in _needs(recipe)
    if settings is None:
        if wants:
            yield (
                f"advantage {recipe.advantage.name} weighs tokens by a process reward model, and the recipe "
                "trains none; add the section "
                f"{_KEY}, for example {_KEY}: {{optimizer: {{lr: 1e-6}}}}"
            )
        return
    if not wants:
        names = " or ".join(users)
        yield (
            f"{_KEY} is set, but advantage {recipe.advantage.name} does not read it; set advantage to "
            f"{names}, or drop {_KEY}"
        )
    yield from _loss_problems(settings)
    names = [reward.name for reward in recipe.reward.functions]
    if not reporting & set(names) and not any(":" in name for name in names):
        yield (
            f"{_KEY} learns which completions are right, which none of reward.functions reports "
            f"({', '.join(names)}); "
            f"add one of {', '.join(sorted(reporting))} (weight 0 if it must not count)"
        )
    if settings.reference == "policy" and recipe.rollout.temperature != 1:
        yield (
            f"{_KEY}.reference is policy, whose log-probs are those at rollout.temperature "
            f"{recipe.rollout.temperature:g}, and the process "
            "reward model's are at 1: their difference would be no log-ratio; set the temperature to 1 or "
            "name a model"
        )
    if settings.updates > recipe.rollout.prompts:
        yield (
            f"{_KEY}.updates is {settings.updates} but rollout.prompts is {recipe.rollout.prompts}: an "
            "update takes whole groups, at least "
            f"one; set {_KEY}.updates to at most {recipe.rollout.prompts}"
        )


def _loss_problems(settings: ProcessReward) -> Iterator[str]:
    try:
        spec = PREFERENCE_LOSSES.check(settings.loss.name, settings.loss.hp)
    except ValueError as error:
        yield f"{_KEY}.loss: {error}"
        return
    if not _possible(spec):
        names = [name for name in PREFERENCE_LOSSES.names() if _possible(PREFERENCE_LOSSES.spec(name))]
        yield (
            f"{_KEY}.loss is {spec.name}, but a step gives single completions called right or wrong, with "
            "log-probs of a reference; "
            f"choose {' or '.join(names)}"
        )


def _possible(spec: MethodSpec) -> bool:
    """Whether it learns from labels, against a reference, and from nothing else."""
    statistics = spec.needs & set(STATISTICS.names())
    needs = (spec.needs - statistics).union(*(STATISTICS.spec(name).needs for name in statistics))
    return (
        "labels" in spec.traits and "scalar_head" not in spec.traits and needs >= _GIVEN and needs <= _GIVEN
    )


def _needs(recipe: OnlineRecipe) -> frozenset[str]:
    known = ADVANTAGES.specs.get(recipe.advantage.name)
    return frozenset() if known is None else known.needs


def _users() -> list[str]:
    return sorted(name for name, spec in ADVANTAGES.specs.items() if "process_reward" in spec.needs)
