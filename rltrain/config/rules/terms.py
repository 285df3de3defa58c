"""Rules about coefficients that change during the run, and about recipes that learn without a reward."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.composition import Methods, MethodUse
from rltrain.config.rules.registries import REWARDS
from rltrain.config.schema import MethodRef, OnlineRecipe
from rltrain.config.user_files import check_method
from rltrain.control import COEFFICIENTS
from rltrain.loss import LOSS_TERMS
from rltrain.needs import (
    ANSWER,
    LOSS_TERM,
    NEEDS_CORRECT,
    NO_SIGNAL,
    REPORTS_ANSWER,
    REPORTS_CORRECT,
    REWARD_FREE,
)

_OUTPUT_PREFIX = "gives_"  # trait of a controller: an input that it gives its term besides the coefficient


def coefficient_problems(recipe: OnlineRecipe) -> Iterator[str]:
    """Checks the name, hyperparameters and inputs of every controller. Each is created once so that it can
    check its own settings.
    """
    for number, term in enumerate(recipe.loss.terms):
        key = f"loss.terms.{number}.coefficient"
        controller_outputs: set[str] = set()
        if isinstance(term.coefficient, MethodRef):
            try:
                check_method(COEFFICIENTS, term.coefficient)
                controller = COEFFICIENTS.bind(term.coefficient.name, term.coefficient.hp)
                controller(**dict.fromkeys(controller.spec.inputs, recipe.train.steps))
            except ValueError as error:
                yield f"{key}: {error}"
                continue
            for problem in COEFFICIENTS.find_problems(term.coefficient.name, term.coefficient.hp, recipe):
                yield f"{key} {term.coefficient.name}: {problem}"
            controller_outputs = {
                trait.removeprefix(_OUTPUT_PREFIX)
                for trait in controller.spec.traits
                if trait.startswith(_OUTPUT_PREFIX)
            }
            yield from _metric_problems(recipe, key, str(_hyperparameter_value(term.coefficient, "metric")))
        spec = LOSS_TERMS.find(term.name)
        if spec is None:
            continue  # reported when the terms are looked up

        term_inputs = set(spec.inputs)
        if term_inputs - controller_outputs:
            names = ", ".join(sorted(term_inputs))
            controllers = [
                name
                for name in COEFFICIENTS.names()
                if {f"{_OUTPUT_PREFIX}{term_input}" for term_input in term_inputs}
                <= COEFFICIENTS.spec(name).traits
            ]
            yield (
                f"{key}: term {term.name} gets {names} from its coefficient's controller, but this one does "
                f"not provide it; set it to {{name: {' or '.join(controllers)}}}"
            )
        if controller_outputs - term_inputs:
            names = ", ".join(sorted(controller_outputs))
            yield (
                f"{key}: the controller gives {names}, which term {term.name} does not take; choose another "
                "controller"
            )


def _hyperparameter_value(ref: MethodRef, name: str) -> object:
    parameter = COEFFICIENTS.spec(ref.name).hyperparameters.get(name)
    return ref.hp.get(name, None if parameter is None else parameter.default)


def _metric_problems(recipe: OnlineRecipe, key: str, metric: str) -> Iterator[str]:
    """Checks that a loss term's metric is used only if the recipe has the term."""
    used_terms = {term.name for term in recipe.loss.terms}
    owners = [
        name for name in LOSS_TERMS.names() if metric == f"loss/{name}" or metric.startswith(f"loss/{name}_")
    ]
    if owners and not used_terms & set(owners):
        yield (
            f"{key}: the controller reads the metric {metric}, which only a term {owners[-1]} reports; add "
            "the term or name another metric"
        )


def reward_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    """Checks that loss, advantage, weights and sampling agree on whether the recipe learns from rewards."""
    policy = methods.policy
    weights = [function.weight for function in recipe.reward.functions]
    is_reward_free = REWARD_FREE in policy.spec.traits | methods.advantage.spec.traits
    if REWARD_FREE in policy.spec.traits:
        if not methods.advantage.has(NO_SIGNAL):
            yield (
                f"loss.policy {policy.name} reads no advantage, but advantage is {methods.advantage.name}; "
                "set advantage to none"
            )
        silent = {reward.name for reward in methods.rewards if reward.has(NO_SIGNAL)}
        weighted = [
            function.name
            for function in recipe.reward.functions
            if function.weight != 0 and function.name not in silent
        ]
        if weighted:
            yield (
                f"loss.policy {policy.name} reads no reward, but reward.functions gives "
                f"{', '.join(weighted)} a weight; set weight to 0: it is then graded and reported, and "
                "teaches nothing"
            )
        if recipe.rollout.dynamic_sampling is not None:
            yield (
                f"loss.policy {policy.name} reads no reward, but rollout.dynamic_sampling chooses prompts by "
                "it; set it to null"
            )
        return

    if methods.advantage.has(NO_SIGNAL) and not methods.terms:
        yield (
            f"advantage is {methods.advantage.name}: loss.policy {policy.name} would learn nothing; set "
            "advantage to one that reads the rewards"
        )
    if not is_reward_free and all(weight == 0 for weight in weights):
        yield "reward.functions: every weight is 0, so every completion scores 0; give one of them a weight"


def verdict_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    """Checks that methods which use correctness or answers have a reward function that reports them."""
    has_user_rewards = len(methods.rewards) < len(recipe.reward.functions)
    used_methods: tuple[MethodUse, ...] = (
        methods.advantage,
        *methods.controls,
        methods.policy,
        *methods.terms,
    )

    for method in used_methods:
        if (
            NEEDS_CORRECT in method.spec.traits
            and not has_user_rewards
            and not any(reward.has(REPORTS_CORRECT) for reward in methods.rewards)
        ):
            yield (
                f"{method} needs correctness, which none of reward.functions reports; add "
                f"one of {', '.join(REWARDS.names_with(REPORTS_CORRECT))} (weight 0 if it must not count)"
            )
        if (
            ANSWER in method.spec.needs
            and not has_user_rewards
            and not any(reward.has(REPORTS_ANSWER) for reward in methods.rewards)
        ):
            yield (
                f"{method} compares the completions' answers, which none of "
                f"reward.functions extracts; add one of {', '.join(REWARDS.names_with(REPORTS_ANSWER))} "
                "(weight 0 if it must not count)"
            )
        for term in method.arguments(LOSS_TERM):
            if term not in {term.name for term in methods.terms}:
                yield (
                    f"{method} marks tokens for the term {term}, which is not in "
                    f"loss.terms; add it or drop {method.name}"
                )
