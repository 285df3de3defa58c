"""Rules across the sections of a recipe that learns from rewards. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.advantage import ADVANTAGES
from rltrain.config.rules import registries
from rltrain.config.rules.composition import Methods, composition_problems
from rltrain.config.rules.environment import environment_problems
from rltrain.config.rules.findings import Findings
from rltrain.config.rules.process_reward import process_reward_problems
from rltrain.config.rules.sampling import (
    MethodLookup,
    dynamic_sampling_problems,
    sampling_problems,
    sampling_warnings,
)
from rltrain.config.rules.terms import coefficient_problems, reward_problems, verdict_problems
from rltrain.config.schema import OnlineRecipe
from rltrain.control import TOKEN_CONTROLS
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.needs import (
    CONTROL,
    EQUAL_SEQUENCES,
    EXTRA_SAMPLES,
    FOR_ADVANTAGE,
    GROUPLESS,
    NO_SIGNAL,
    OFF_POLICY_ONLY,
    OLD_LOGP,
    ON_POLICY_ONLY,
    PENALTY_OF_REWARD,
    REPORTS_CORRECT,
    ROLLOUT_LOGP,
    SEQUENCE_LEVEL,
    SINGLE_TURN,
    TEACHER_LOGP,
    TRAINS,
)


def check_online(recipe: OnlineRecipe) -> Findings:
    """All problems and warnings that are known before anything is loaded."""
    lookup = MethodLookup()
    methods = _look_up_methods(recipe, lookup)
    problems = list(lookup.problems)
    problems += [*sampling_problems(recipe), *coefficient_problems(recipe), *environment_problems(recipe)]
    problems += process_reward_problems(recipe)
    if methods is not None:
        problems += [*_method_problems(recipe, methods), *lookup.find_own_problems(recipe)]
    if problems or methods is None:
        return Findings(problems, [])
    return Findings([], [*sampling_warnings(recipe), *_method_warnings(recipe, methods)])


def _look_up_methods(recipe: OnlineRecipe, lookup: MethodLookup) -> Methods | None:
    """The recipe's methods; None if a registry refuses one of them."""
    loss = recipe.loss
    advantage = lookup(ADVANTAGES, "advantage", recipe.advantage)
    policy = lookup(POLICY_LOSSES, "loss.policy", loss.policy)
    aggregate = lookup(AGGREGATES, "loss.aggregate", loss.aggregate)
    controls = lookup.look_up_all(TOKEN_CONTROLS, "control", recipe.control)
    terms = lookup.look_up_all(LOSS_TERMS, "loss.terms", loss.terms)
    sources = lookup.look_up_all(
        registries.EXTRA_SAMPLES, "rollout.extra_samples", recipe.rollout.extra_samples
    )
    rewards = lookup.look_up_sampling(recipe)

    if lookup.problems:
        return None
    assert advantage is not None and policy is not None and aggregate is not None
    return Methods(advantage, controls, policy, terms, aggregate, rewards, sources)


def _method_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    yield from _group_problems(recipe, methods)
    yield from dynamic_sampling_problems(recipe, methods.rewards)
    yield from composition_problems(methods)
    yield from _loss_problems(methods)
    yield from _off_policy_problems(recipe, methods)
    yield from _extra_sample_problems(recipe, methods)
    yield from _source_companion_problems(recipe, methods)
    yield from reward_problems(recipe, methods)
    yield from verdict_problems(recipe, methods)


def _group_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    if recipe.rollout.n == 1 and GROUPLESS not in methods.advantage.spec.traits:
        groupless = [
            name for name in ADVANTAGES.names_with(GROUPLESS) if NO_SIGNAL not in ADVANTAGES.spec(name).traits
        ]
        yield (
            f"rollout.n is 1, but advantage {methods.advantage.name} compares completions of one prompt; set "
            f"rollout.n to at least 2, or advantage to {' or '.join(groupless)}"
        )


def _loss_problems(methods: Methods) -> Iterator[str]:
    if SEQUENCE_LEVEL in methods.policy.spec.traits and not methods.aggregate.has(EQUAL_SEQUENCES):
        yield (
            f"loss.policy {methods.policy.name} has one ratio per sequence and weighs sequences equally, but "
            f"loss.aggregate is {methods.aggregate.name}, which would weigh them by length; set "
            f"loss.aggregate to {' or '.join(AGGREGATES.names_with(EQUAL_SEQUENCES))}"
        )
    for term in methods.terms:
        for name in term.arguments(PENALTY_OF_REWARD):
            if methods.advantage.values.get(name):
                yield (
                    f"the penalty {term.name} counts twice: in the reward (advantage.{name} "
                    f"{methods.advantage.values[name]:g}) and as a loss term ({term.key}); keep one of them"
                )


def _off_policy_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    learning_methods = (methods.advantage, *methods.controls, methods.policy, *methods.terms)
    if recipe.learner.updates_per_step == 1 and not recipe.rollout.trust_logp:
        for method in learning_methods:
            if OFF_POLICY_ONLY in method.spec.traits:
                yield (
                    f"{method} acts on the ratio to the old policy, which is exactly 1 "
                    "with one update per rollout (learner.updates 1 x learner.epochs 1): it would change "
                    "nothing; set learner.updates to 2 or more"
                )
    if recipe.rollout.trust_logp:
        for control in methods.controls:
            if {OLD_LOGP, ROLLOUT_LOGP} <= control.spec.needs:
                yield (
                    f"{control} weighs by old_logp over rollout_logp, which "
                    "rollout.trust_logp makes equal: it would change nothing; set rollout.trust_logp to "
                    "false or drop the control"
                )


def _extra_sample_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    names = [source.name for source in methods.sources]
    claimed_names = {
        source_name for control in methods.controls for source_name in control.arguments(EXTRA_SAMPLES)
    }

    for source in methods.sources:
        if names.count(source.name) > 1:
            yield (
                f"{source.key}: {source.name} is listed {names.count(source.name)} times in "
                "rollout.extra_samples; its rows could not be distinguished: keep one"
            )
        if TRAINS in source.spec.traits and recipe.rollout.trust_logp:
            yield (
                f"{source} adds rows that the policy did not sample at "
                "rollout.temperature, so the engine has no log-probs of the policy for them, which "
                "rollout.trust_logp would use; set rollout.trust_logp to false"
            )
        if (
            FOR_ADVANTAGE in source.spec.traits
            and "source" not in methods.advantage.spec.inputs
            and source.name not in claimed_names
        ):
            yield (
                f"{source} adds rows that only an advantage which distinguishes sources "
                f"can use, and {methods.advantage.name} does not; set advantage to one that does "
                f"({', '.join(_source_advantages())}) or drop the source"
            )


def _source_companion_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    """Checks that sources have what they are made for, and that those which others need are listed."""
    names = [source.name for source in methods.sources]
    controls = {control.name for control in methods.controls}
    if recipe.rollout.environment is not None:
        for source in methods.sources:
            if source.has(SINGLE_TURN):
                yield (
                    f"{source} adds completions of one turn, but in rollout.environment "
                    f"{recipe.rollout.environment.name} a completion is an episode; drop the source or the "
                    "environment"
                )
    for source in methods.sources:
        for control_name in source.arguments(CONTROL):
            if control_name not in controls:
                yield (
                    f"{source} adds rows that only the control {control_name} weighs, and control does not "
                    f"list it: nothing weighs them; add {control_name} to control"
                )

    for method in (methods.advantage, *methods.controls):
        for source_name in method.arguments(EXTRA_SAMPLES):
            if source_name not in names:
                yield (
                    f"{method} works on rows that only the {source_name} source samples; "
                    f"add {source_name} to rollout.extra_samples"
                )


def _source_advantages() -> list[str]:
    return sorted(name for name, spec in ADVANTAGES.specs.items() if "source" in spec.inputs)


def _method_warnings(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    policy = methods.policy
    learning_methods = (methods.advantage, *methods.controls, policy, *methods.terms)
    distilled = [
        method for method in learning_methods if TEACHER_LOGP in method.spec.needs_with(method.values)
    ]
    if distilled and recipe.model.teacher is None:
        yield (
            f"{distilled[0]} learns from a teacher, but model.teacher is null: the "
            "teacher is the initial model; set model.teacher to a model with the same tokenizer"
        )
    if recipe.model.teacher is not None and not distilled:
        yield (
            f"model.teacher is {recipe.model.teacher}, but no function of the recipe needs teacher_logp: it "
            "is not loaded"
        )

    low = policy.values.get("eps_low")
    high = policy.values.get("eps_high")
    if recipe.learner.updates_per_step == 1 and low != high:
        yield (
            f"loss.policy {policy.name} clips at eps_low {low:g} and eps_high {high:g}, but with one update "
            "per rollout (learner.updates 1 x learner.epochs 1) the ratio is exactly 1 and nothing clips; "
            "set learner.updates to 2 or more"
        )
    if policy.has(ON_POLICY_ONLY) and recipe.learner.updates_per_step > 1:
        yield (
            f"loss.policy {policy.name} has no ratio, but the step takes {recipe.learner.updates_per_step} "
            "updates: all but the first are off-policy; set learner.updates and learner.epochs to 1, or "
            "loss.policy to clip"
        )

    has_user_rewards = len(methods.rewards) < len(recipe.reward.functions)
    if (
        recipe.rollout.dynamic_sampling is not None
        and has_user_rewards
        and not any(reward.has(REPORTS_CORRECT) for reward in methods.rewards)
    ):
        yield (
            "rollout.dynamic_sampling looks at raw correctness: your reward function must put a part named "
            "'correct' into its scores, or be the only one and give 0 and 1, else prompts are kept where "
            "rewards differ"
        )
