"""Rules about the process reward model of an online recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.advantage import ADVANTAGES
from rltrain.config.rules.optimizer import optimizer_problems
from rltrain.config.rules.registries import REWARDS
from rltrain.config.schema import OnlineRecipe, ProcessReward
from rltrain.config.user_files import check_method
from rltrain.loss.preference import PREFERENCE_LOSSES, STATISTICS
from rltrain.needs import LABELS, PROCESS_REWARD, REPORTS_CORRECT, SCALAR_HEAD
from rltrain.registry import MethodSpec

_KEY = "process_reward"
_AVAILABLE = frozenset({"label", "ref_logp"})  # what a step provides to the loss


def process_reward_problems(recipe: OnlineRecipe) -> Iterator[str]:
    settings = recipe.process_reward
    suitable_advantages = _process_reward_advantages()
    is_used = PROCESS_REWARD in _advantage_needs(recipe)
    if settings is None:
        if is_used:
            yield (
                f"advantage {recipe.advantage.name} weighs tokens by a process reward model, and the recipe "
                f"trains none; add the section {_KEY}, for example {_KEY}: {{optimizer: {{lr: 1e-6}}}}"
            )
        return
    if not is_used:
        names = " or ".join(suitable_advantages)
        yield (
            f"{_KEY} is set, but advantage {recipe.advantage.name} does not read it; set advantage to "
            f"{names}, or drop {_KEY}"
        )
    yield from _loss_problems(settings)
    yield from optimizer_problems(f"{_KEY}.optimizer", settings.optimizer)
    names = [reward.name for reward in recipe.reward.functions]
    correctness_rewards = REWARDS.names_with(REPORTS_CORRECT)
    if not set(correctness_rewards) & set(names) and not any(":" in name for name in names):
        yield (
            f"{_KEY} learns which completions are right, which none of reward.functions reports "
            f"({', '.join(names)}); add one of {', '.join(correctness_rewards)} (weight 0 if it must "
            "not count)"
        )
    if settings.reference == "policy" and recipe.rollout.temperature != 1:
        yield (
            f"{_KEY}.reference is policy, whose log-probs are those at rollout.temperature "
            f"{recipe.rollout.temperature:g}, and the process reward model's are at 1: their difference "
            "would be no log-ratio; set the temperature to 1 or name a model"
        )
    if settings.updates > recipe.rollout.prompts:
        yield (
            f"{_KEY}.updates is {settings.updates} but rollout.prompts is {recipe.rollout.prompts}: an "
            f"update takes whole groups, at least one; set {_KEY}.updates to at most {recipe.rollout.prompts}"
        )


def _loss_problems(settings: ProcessReward) -> Iterator[str]:
    try:
        spec = check_method(PREFERENCE_LOSSES, settings.loss)
    except ValueError as error:
        yield f"{_KEY}.loss: {error}"
        return
    if not _learns_from_labels(spec):
        names = [
            name for name in PREFERENCE_LOSSES.names() if _learns_from_labels(PREFERENCE_LOSSES.spec(name))
        ]
        yield (
            f"{_KEY}.loss is {spec.name}, but a step provides single completions labelled right or wrong, "
            f"with log-probs of a reference; choose {' or '.join(names)}"
        )


def _learns_from_labels(spec: MethodSpec) -> bool:
    """Whether the loss needs labels and reference log-probs, and no other inputs."""
    statistics = spec.needs & set(STATISTICS.names())
    needs = (spec.needs - statistics).union(*(STATISTICS.spec(name).needs for name in statistics))
    return (
        LABELS in spec.traits
        and SCALAR_HEAD not in spec.traits
        and needs >= _AVAILABLE
        and needs <= _AVAILABLE
    )


def _advantage_needs(recipe: OnlineRecipe) -> frozenset[str]:
    spec = ADVANTAGES.find(recipe.advantage.name)
    return frozenset() if spec is None else spec.needs


def _process_reward_advantages() -> list[str]:
    return sorted(name for name, spec in ADVANTAGES.specs.items() if PROCESS_REWARD in spec.needs)
