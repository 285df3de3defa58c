"""Rules across sections: what a recipe can say that no schema forbids and no run should find out. Imports no torch.

A problem refuses the recipe, a warning is printed; both name the key, what it holds and the remedy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reward import MODULES as REWARD_MODULES
from rltrain.advantage import ADVANTAGES
from rltrain.config.check_environment import environment_problems
from rltrain.config.check_graders import grader_problems
from rltrain.config.check_offline import look_at
from rltrain.config.check_pairs import JUDGES, look_at_pairs, sampling_recipe
from rltrain.config.check_process_reward import process_reward_problems
from rltrain.config.check_terms import coefficient_problems, reward_problems, verdict_problems
from rltrain.config.composition import Chosen, Methods, composition_problems
from rltrain.config.schema import AnyRecipe, MethodRef, OfflineRecipe, PairRecipe, Recipe, RewardRef
from rltrain.config.user_code import definition, unknown_keywords
from rltrain.config.user_files import changed_code
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.errors import RecipeError
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.registry import Registry

REWARDS = Registry("reward", modules=(*REWARD_MODULES, "rltrain.rollout.model_rewards"), decorator="reward")
ARMS = Registry("arm", modules=("rltrain.rollout.arms",))
ORDERS = Registry("prompt order", modules=("rltrain.data.order", "rltrain.data.gain_rl"))
REGISTRIES = (
    *(ADVANTAGES, TOKEN_CONTROLS, POLICY_LOSSES, LOSS_TERMS, AGGREGATES, REWARDS, ARMS, ORDERS, COEFFICIENTS),
    *(PREFERENCE_LOSSES, JUDGES),
)

_REWARDS_WITH_CORRECT = frozenset({"math_answer", "exact", "choice", "episode", "code_tests", "code_io"})


@dataclass(frozen=True)
class Checked:
    """A recipe that may run, and what its author should know before it does."""

    recipe: AnyRecipe
    warnings: tuple[str, ...]


def check(recipe: AnyRecipe) -> Checked:
    """Every rule. Raises RecipeError with all problems found."""
    if isinstance(recipe, OfflineRecipe):
        offline = look_at(recipe)
        if offline.problems:
            raise RecipeError(offline.problems)
        return Checked(recipe, tuple(offline.warnings))
    if isinstance(recipe, PairRecipe):
        return _checked_pairs(recipe)
    methods, problems = _methods(recipe)
    problems += [*_plain_problems(recipe), *coefficient_problems(recipe), *environment_problems(recipe)]
    problems += process_reward_problems(recipe, _REWARDS_WITH_CORRECT)
    if methods is not None:
        problems += _method_problems(recipe, methods)
    if problems:
        raise RecipeError(problems)
    assert methods is not None
    return Checked(recipe, (*_plain_warnings(recipe), *_method_warnings(recipe, methods)))


def _checked_pairs(recipe: PairRecipe) -> Checked:
    """Pairs and their loss, and the rules about sampling and rewards that other recipes have."""
    (problems, warnings), sampling = look_at_pairs(recipe), sampling_recipe(recipe)
    methods, found = _methods(sampling)
    problems = [*problems, *found, *_plain_problems(sampling)]
    if methods is not None:
        problems += [*_group_problems(sampling, methods), *_of_rewards(sampling, methods)]
    if problems:
        raise RecipeError(problems)
    return Checked(recipe, (*warnings, *_plain_warnings(sampling)))


def updates_per_step(recipe: Recipe) -> int:
    return recipe.learner.updates * recipe.learner.epochs


# methods and their hyperparameters -----------------------------------------------------------------------------------


def _methods(recipe: Recipe) -> tuple[Methods | None, list[str]]:
    """The recipe's methods, None if one of them is not what its registry knows."""
    problems: list[str] = []

    def choose(registry: Registry, key: str, ref: MethodRef) -> Chosen | None:
        try:
            spec = registry.check(ref.name, ref.hp)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            return None
        return Chosen(key, spec, {name: item.default for name, item in spec.hyperparameters.items()} | ref.hp)

    loss = recipe.loss
    single = [
        choose(ADVANTAGES, "advantage", recipe.advantage),
        choose(POLICY_LOSSES, "loss.policy", loss.policy),
        choose(AGGREGATES, "loss.aggregate", loss.aggregate),
    ]
    controls = [choose(TOKEN_CONTROLS, f"control.{i}", ref) for i, ref in enumerate(recipe.control)]
    terms = [choose(LOSS_TERMS, f"loss.terms.{i}", ref) for i, ref in enumerate(loss.terms)]
    choose(ORDERS, "data.order", recipe.data.order)
    arms = [choose(ARMS, f"rollout.arms.{i}", ref) for i, ref in enumerate(recipe.rollout.arms)]
    rewards: list[Chosen | None] = []
    for i, ref in enumerate(recipe.reward.functions):
        key = f"reward.functions.{i}"
        if is_user_function(ref.name):
            problems += [f"{key}: {problem}" for problem in _user_function_problems(ref)]
        else:
            rewards.append(choose(REWARDS, key, ref))
    if problems:
        return None, problems
    advantage, policy, aggregate = _known(single)
    return Methods(advantage, _known(controls), policy, _known(terms), aggregate, _known(rewards), _known(arms)), problems


def _known(chosen: Sequence[Chosen | None]) -> tuple[Chosen, ...]:
    return tuple(one for one in chosen if one is not None)


def is_user_function(name: str) -> bool:
    """Whether a reward is named as ``path/to/file.py:function``."""
    return ":" in name or name.endswith(".py")


def _user_function_problems(ref: RewardRef) -> Iterator[str]:
    """Problems of ``path/to/file.py:function``."""
    name = ref.name
    file, colon, function = name.rpartition(":")
    if not colon or not file or not function:
        yield f"{name!r} must name a file and a function in it, as in path/to/file.py:function"
        return
    try:
        node = definition(file, function, ast.FunctionDef, ast.AsyncFunctionDef)
    except ValueError as error:
        yield str(error)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from unknown_keywords(node, ref.hp, name)
    if (problem := changed_code(name, ref.sha256)) is not None:
        yield problem


# rules that need no method -------------------------------------------------------------------------------------------


def _plain_problems(recipe: Recipe) -> Iterator[str]:
    rollout, learner = recipe.rollout, recipe.learner
    if learner.updates > rollout.prompts:
        yield (
            f"learner.updates is {learner.updates} but rollout.prompts is {rollout.prompts}: an update takes whole groups, at least one; "
            f"set learner.updates to at most {rollout.prompts} or raise rollout.prompts"
        )
    longest = recipe.data.max_prompt_tokens + rollout.max_tokens
    if learner.tokens_per_micro_batch < longest:
        yield (
            f"learner.tokens_per_micro_batch is {learner.tokens_per_micro_batch}, but one row can have data.max_prompt_tokens + "
            f"rollout.max_tokens = {recipe.data.max_prompt_tokens} + {rollout.max_tokens} = {longest} tokens; "
            f"set learner.tokens_per_micro_batch to at least {longest}"
        )
    if rollout.dynamic_sampling is not None and rollout.dynamic_sampling.max_rounds == 1:
        yield (
            "rollout.dynamic_sampling.max_rounds is 1: the first round is all there is and no group is ever replaced; "
            "set it to 2 or more, or rollout.dynamic_sampling to null"
        )
    if rollout.dynamic_sampling is not None and rollout.dynamic_sampling.accuracy is not None:
        low, high = rollout.dynamic_sampling.accuracy
        if not any(low - 1e-9 <= right / rollout.n <= high + 1e-9 for right in range(rollout.n + 1)):
            yield (
                f"rollout.dynamic_sampling.accuracy is [{low:g}, {high:g}], and no number of right ones among rollout.n {rollout.n} "
                f"completions is such a share: every prompt would be replaced; widen it or raise rollout.n"
            )
    if recipe.data.eval is not None and max(recipe.eval.k, default=0) > recipe.eval.n:
        yield (
            f"eval.k asks for pass@{max(recipe.eval.k)} but eval.n is {recipe.eval.n}: pass@k needs at least k completions per prompt; "
            f"set eval.n to {max(recipe.eval.k)} or drop {max(recipe.eval.k)} from eval.k"
        )
    if any(k < 1 for k in recipe.eval.k):
        yield f"eval.k is {list(recipe.eval.k)}: every k of pass@k is at least 1"


def _plain_warnings(recipe: Recipe) -> Iterator[str]:
    learner, total = recipe.learner, recipe.train.steps * updates_per_step(recipe)
    if learner.optimizer.lr == 0:
        yield "learner.optimizer.lr is 0: the weights never change; set a learning rate unless that is what you test"
    if learner.optimizer.warmup_steps > total:
        yield (
            f"learner.optimizer.warmup_steps is {learner.optimizer.warmup_steps} but the run takes {total} optimizer updates "
            f"(train.steps x learner.updates x learner.epochs): the learning rate never reaches {learner.optimizer.lr:g}"
        )
    if recipe.rollout.prompts % learner.updates:
        small, more = divmod(recipe.rollout.prompts, learner.updates)
        yield (
            f"learner.updates {learner.updates} does not divide rollout.prompts {recipe.rollout.prompts}: "
            f"{more} updates of a step hold {small + 1} groups and {learner.updates - more} hold {small}"
        )
    low, high = recipe.rollout.mismatch_warn, recipe.rollout.mismatch_stop
    if low is not None and high is not None and low > high:
        yield f"rollout.mismatch_warn {low:g} is above rollout.mismatch_stop {high:g}: the run stops before it warns; lower mismatch_warn"
    if recipe.data.eval is not None and recipe.eval.temperature == 0 and recipe.eval.n > 1:
        yield f"eval.temperature is 0 and eval.n is {recipe.eval.n}: greedy completions are all equal; set eval.n and eval.k to 1"


# rules about methods -------------------------------------------------------------------------------------------------


def _method_problems(recipe: Recipe, methods: Methods) -> Iterator[str]:
    yield from _group_problems(recipe, methods)
    yield from composition_problems(methods)
    yield from _loss_problems(methods)
    yield from _off_policy_problems(recipe, methods)
    yield from _arm_problems(recipe, methods)
    yield from reward_problems(recipe, methods)
    yield from verdict_problems(recipe, methods, _REWARDS_WITH_CORRECT)
    yield from _of_rewards(recipe, methods)


def _of_rewards(recipe: Recipe, methods: Methods) -> Iterator[str]:
    yield from grader_problems(recipe, methods)
    for reward in methods.rewards:
        if reward.name == "length":
            yield from _length_problems(recipe, reward)
        if reward.name == "format":
            yield from _format_problems(reward)


def _group_problems(recipe: Recipe, methods: Methods) -> Iterator[str]:
    if recipe.rollout.n == 1 and "groupless" not in methods.advantage.spec.traits:
        groupless = sorted(name for name, spec in ADVANTAGES.specs.items() if "groupless" in spec.traits and "no_signal" not in spec.traits)
        yield (
            f"rollout.n is 1, but advantage {methods.advantage.name} compares completions of one prompt; "
            f"set rollout.n to at least 2, or advantage to {' or '.join(groupless)}"
        )
    if recipe.rollout.dynamic_sampling is None:
        return
    if recipe.rollout.n == 1:
        yield (
            "rollout.dynamic_sampling keeps prompts that are neither all right nor all wrong, which one completion cannot be; "
            "set rollout.n to at least 2, or rollout.dynamic_sampling to null"
        )
    users = len(methods.rewards) < len(recipe.reward.functions)
    if not users and not _REWARDS_WITH_CORRECT & {reward.name for reward in methods.rewards}:
        yield (
            f"rollout.dynamic_sampling looks at raw correctness, which none of reward.functions reports "
            f"({', '.join(reward.name for reward in methods.rewards)}); add one of {', '.join(sorted(_REWARDS_WITH_CORRECT))} "
            f"(weight 0 if it must not count), or set rollout.dynamic_sampling to null"
        )


def _loss_problems(methods: Methods) -> Iterator[str]:
    if "sequence_level" in methods.policy.spec.traits and methods.aggregate.name != "seq_mean_token_mean":
        yield (
            f"loss.policy {methods.policy.name} has one ratio per sequence and weighs sequences equally, but loss.aggregate is "
            f"{methods.aggregate.name}, which would weigh them by length; set loss.aggregate to seq_mean_token_mean"
        )
    term = next((term for term in methods.terms if term.name == "kl"), None)
    if term is not None and methods.advantage.values.get("kl_coef"):
        yield (
            f"the KL penalty counts twice: in the reward (advantage.kl_coef {methods.advantage.values['kl_coef']:g}) and as a loss term "
            f"({term.key}); keep one of them"
        )


def _off_policy_problems(recipe: Recipe, methods: Methods) -> Iterator[str]:
    everything = (methods.advantage, *methods.controls, methods.policy, *methods.terms)
    if updates_per_step(recipe) == 1:
        for chosen in everything:
            if "off_policy_only" in chosen.spec.traits:
                yield (
                    f"{chosen.key} {chosen.name} acts on the ratio to the old policy, which is exactly 1 with one update per rollout "
                    f"(learner.updates 1 x learner.epochs 1): it would change nothing; set learner.updates to 2 or more"
                )
    if recipe.rollout.trust_logp:
        for control in methods.controls:
            if {"old_logp", "rollout_logp"} <= control.spec.needs:
                yield (
                    f"{control.key} {control.name} weighs by old_logp over rollout_logp, which rollout.trust_logp makes equal: "
                    f"it would change nothing; set rollout.trust_logp to false or drop the control"
                )


def _arm_problems(recipe: Recipe, methods: Methods) -> Iterator[str]:
    names = [arm.name for arm in methods.arms]
    controls = {control.name for control in methods.controls}
    claimed = {wanted for control in methods.controls for wanted in control.arguments("arm")}
    for arm in methods.arms:
        if names.count(arm.name) > 1:
            yield f"{arm.key}: {arm.name} stands {names.count(arm.name)} times in rollout.arms; its rows could not be told apart: keep one"
        if "trains" in arm.spec.traits and recipe.rollout.trust_logp:
            yield (
                f"{arm.key} {arm.name} adds rows that the policy did not sample at rollout.temperature, so the engine has no log-probs of "
                f"the policy for them, which rollout.trust_logp would take; set rollout.trust_logp to false"
            )
        if "for_advantage" in arm.spec.traits and "arm" not in methods.advantage.spec.inputs and arm.name not in claimed:
            yield (
                f"{arm.key} {arm.name} adds rows that only an advantage which tells arms apart can use, and {methods.advantage.name} does "
                f"not; set advantage to one that does ({', '.join(_arm_advantages())}) or drop the arm"
            )
    if "answer" in names and recipe.rollout.environment is not None:
        yield (
            f"rollout.arms has answer, but in rollout.environment {recipe.rollout.environment.name} a completion is an episode, which no "
            f"column of the data spells out; drop the arm or the environment"
        )
    if "aepo" in names and "aepo" not in controls:
        yield "rollout.arms has aepo, but control has not: the arm samples tempered rows and nothing weighs them; add aepo to control"
    for chosen in (methods.advantage, *methods.controls):
        for wanted in sorted(trait.removeprefix("arm:") for trait in chosen.spec.traits if trait.startswith("arm:")):
            if wanted not in names:
                yield f"{chosen.key} {chosen.name} works on rows that only the {wanted} arm samples; add {wanted} to rollout.arms"


def _arm_advantages() -> list[str]:
    return sorted(name for name, spec in ADVANTAGES.specs.items() if "arm" in spec.inputs)


def _length_problems(recipe: Recipe, reward: Chosen) -> Iterator[str]:
    limit, buffer, longest = reward.values["max_tokens"], reward.values["buffer_tokens"], recipe.rollout.max_tokens
    if limit is None or buffer is None or not 0 < buffer <= limit:
        yield (
            f"{reward.key} length: max_tokens is {limit} and buffer_tokens {buffer}; both are needed, 0 < buffer_tokens <= max_tokens; "
            f"with rollout.max_tokens {longest} write max_tokens: {longest}, buffer_tokens: {max(1, longest // 5)}"
        )
    elif limit > longest:
        yield (
            f"{reward.key} length: max_tokens is {limit}, but completions end at rollout.max_tokens {longest} and never reach it; "
            f"set {reward.key}.max_tokens to at most {longest}, and buffer_tokens below it"
        )


def _format_problems(reward: Chosen) -> Iterator[str]:
    regex, tags = reward.values["regex"], reward.values["tags"]
    if regex is None and not tags:
        yield f"{reward.key} format: nothing is required; set regex, tags (for example [think, answer]) or both"
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            yield f"{reward.key} format: regex {regex!r} is not a regular expression: {error}; in YAML put it in single quotes"


def _method_warnings(recipe: Recipe, methods: Methods) -> Iterator[str]:
    policy = methods.policy
    everything = (methods.advantage, *methods.controls, policy, *methods.terms)
    distilled = [one for one in everything if "teacher_logp" in one.spec.needs_with(one.values)]
    if distilled and recipe.model.teacher is None:
        yield (
            f"{distilled[0].key} {distilled[0].name} learns from a teacher, but model.teacher is null: the teacher is the starting point; "
            f"set model.teacher to a model with the same tokenizer"
        )
    if recipe.model.teacher is not None and not distilled:
        yield f"model.teacher is {recipe.model.teacher}, but no function of the recipe needs teacher_logp: it is not loaded"
    low, high = policy.values.get("eps_low"), policy.values.get("eps_high")
    if updates_per_step(recipe) == 1 and low != high:
        yield (
            f"loss.policy {policy.name} clips at eps_low {low:g} and eps_high {high:g}, but with one update per rollout "
            f"(learner.updates 1 x learner.epochs 1) the ratio is exactly 1 and nothing clips; set learner.updates to 2 or more"
        )
    if policy.name == "reinforce" and updates_per_step(recipe) > 1:
        yield (
            f"loss.policy reinforce has no ratio, but the step takes {updates_per_step(recipe)} updates: all but the first are off-policy; "
            f"set learner.updates and learner.epochs to 1, or loss.policy to clip"
        )
    users = len(methods.rewards) < len(recipe.reward.functions)
    if recipe.rollout.dynamic_sampling is not None and users and not _REWARDS_WITH_CORRECT & {r.name for r in methods.rewards}:
        yield (
            "rollout.dynamic_sampling looks at raw correctness: your reward function must put a part named 'correct' into its scores, "
            "or be the only one and give 0 and 1, else prompts are kept where rewards differ"
        )
