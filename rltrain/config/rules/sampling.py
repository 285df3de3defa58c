"""Rules about sampling, rewards and evaluation for every recipe with completions sampled by the policy.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rltrain.config.rules.composition import MethodUse
from rltrain.config.rules.optimizer import optimizer_problems
from rltrain.config.rules.registries import ORDERS, REWARDS
from rltrain.config.rules.rewards import is_user_function, user_function_problems
from rltrain.config.rules.server import server_problems
from rltrain.config.rules.token_choice import token_choice_problems
from rltrain.config.schema import MethodRef, Rollout, SampledRecipe
from rltrain.config.user_files import check_method
from rltrain.needs import REPORTS_CORRECT
from rltrain.registry import Registry


class MethodLookup:
    """Looks up the methods of a recipe and collects their problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._uses: list[tuple[Registry, str, MethodUse]] = []  # with the name in the recipe

    def __call__(self, registry: Registry, key: str, ref: MethodRef) -> MethodUse | None:
        """The method with its hyperparameters, defaults included. If the registry refuses it: None, and a
        problem is recorded.
        """
        try:
            spec = check_method(registry, ref)
        except ValueError as error:
            self.problems.append(f"{key}: {error}")
            return None
        use = MethodUse(key, spec, spec.values_with(ref.hp))
        self._uses.append((registry, ref.name, use))
        return use

    def find_own_problems(self, recipe: Any) -> Iterator[str]:
        """What the rules beside the methods that were looked up say of their settings in ``recipe``."""
        for registry, name, use in self._uses:
            for problem in registry.find_problems(name, use.values, recipe):
                yield f"{use}: {problem}"

    def look_up_all(self, registry: Registry, key: str, refs: Sequence[MethodRef]) -> tuple[MethodUse, ...]:
        """The methods of ``refs`` that the registry accepts."""
        uses = [self(registry, f"{key}.{number}", ref) for number, ref in enumerate(refs)]
        return tuple(use for use in uses if use is not None)

    def look_up_sampling(self, recipe: SampledRecipe) -> tuple[MethodUse, ...]:
        """Looks up the order of prompts and the reward functions; returns the registered rewards."""
        self(ORDERS, "data.order", recipe.data.order)
        rewards: list[MethodUse | None] = []
        for number, ref in enumerate(recipe.reward.functions):
            key = f"reward.functions.{number}"
            if is_user_function(ref.name):
                self.problems += [f"{key}: {problem}" for problem in user_function_problems(ref)]
            else:
                rewards.append(self(REWARDS, key, ref))
        return tuple(use for use in rewards if use is not None)


def sampling_problems(recipe: SampledRecipe) -> Iterator[str]:
    rollout = recipe.rollout
    learner = recipe.learner
    yield from optimizer_problems("learner.optimizer", learner.optimizer)
    if learner.updates > rollout.prompts:
        yield (
            f"learner.updates is {learner.updates} but rollout.prompts is {rollout.prompts}: an update takes "
            f"whole groups, at least one; set learner.updates to at most {rollout.prompts} or raise "
            "rollout.prompts"
        )
    longest = recipe.data.max_prompt_tokens + rollout.max_tokens
    if learner.tokens_per_micro_batch < longest:
        yield (
            f"learner.tokens_per_micro_batch is {learner.tokens_per_micro_batch}, but one row can have "
            f"data.max_prompt_tokens + rollout.max_tokens = {recipe.data.max_prompt_tokens} + "
            f"{rollout.max_tokens} = {longest} tokens; set learner.tokens_per_micro_batch to at least "
            f"{longest}"
        )
    if rollout.dynamic_sampling is not None and rollout.dynamic_sampling.max_rounds == 1:
        yield (
            "rollout.dynamic_sampling.max_rounds is 1: there is only the first round and no group is ever "
            "replaced; set it to 2 or more, or rollout.dynamic_sampling to null"
        )
    if rollout.dynamic_sampling is not None and rollout.dynamic_sampling.accuracy is not None:
        low, high = rollout.dynamic_sampling.accuracy
        if not any(low - 1e-9 <= right / rollout.n <= high + 1e-9 for right in range(rollout.n + 1)):
            yield (
                f"rollout.dynamic_sampling.accuracy is [{low:g}, {high:g}], but no number of right ones "
                f"among rollout.n {rollout.n} completions is such a share: every prompt would be replaced; "
                "widen it or raise rollout.n"
            )
    yield from token_choice_problems(recipe)
    yield from _engine_ranks_problems(rollout)
    yield from _eval_problems(recipe)
    if rollout.engine == "vllm_server":
        yield from server_problems(rollout)
    elif rollout.workers is not None:
        yield (
            f"rollout.workers is given, but rollout.engine is {rollout.engine}, which has none; set "
            "rollout.engine to vllm_server, or rollout.workers to null"
        )
    if rollout.reference_workers is not None and rollout.workers is None:
        yield (
            "rollout.reference_workers stand beside the policy's rollout.workers, which is null; give it "
            "too, or drop rollout.reference_workers"
        )
    if rollout.workers is not None and rollout.workers.patience_seconds >= recipe.train.deadline_seconds:
        yield (
            f"rollout.workers.patience_seconds is {rollout.workers.patience_seconds:g} and "
            f"train.deadline_seconds {recipe.train.deadline_seconds:g}: the deadline would end the run "
            "before it could be saved; lower the one or raise the other"
        )


def _engine_ranks_problems(rollout: Rollout) -> Iterator[str]:
    """Why ranks could not share an engine: each must call it as often as the others."""
    size = rollout.vllm.tensor_parallel
    if size == 1:
        return
    if rollout.engine != "vllm":
        yield (
            f"rollout.vllm.tensor_parallel is {size}, but rollout.engine is {rollout.engine}, whole on "
            "every rank; use the engine vllm, or 1"
        )
    for key, value in (("environment", rollout.environment), ("extra_samples", rollout.extra_samples)):
        if value:
            yield (
                f"rollout.vllm.tensor_parallel is {size} and rollout.{key} is given: ranks would call the "
                "engine that they share at different times; use 1"
            )


def _eval_problems(recipe: SampledRecipe) -> Iterator[str]:
    if recipe.data.eval is not None and max(recipe.eval.k, default=0) > recipe.eval.n:
        yield (
            f"eval.k asks for pass@{max(recipe.eval.k)} but eval.n is {recipe.eval.n}: pass@k needs at least "
            f"k completions per prompt; set eval.n to {max(recipe.eval.k)} or drop {max(recipe.eval.k)} from "
            "eval.k"
        )


def sampling_warnings(recipe: SampledRecipe) -> Iterator[str]:
    learner = recipe.learner
    total = recipe.train.steps * recipe.learner.updates_per_step
    if learner.optimizer.lr == 0:
        yield (
            "learner.optimizer.lr is 0: the weights never change; set a learning rate unless that is what "
            "you test"
        )
    if learner.optimizer.warmup_steps > total:
        yield (
            f"learner.optimizer.warmup_steps is {learner.optimizer.warmup_steps} but the run takes {total} "
            "optimizer updates (train.steps x learner.updates x learner.epochs): the learning rate never "
            f"reaches {learner.optimizer.lr:g}"
        )
    if recipe.rollout.prompts % learner.updates:
        small, larger = divmod(recipe.rollout.prompts, learner.updates)
        yield (
            f"learner.updates {learner.updates} does not divide rollout.prompts {recipe.rollout.prompts}: "
            f"{larger} updates of a step hold {small + 1} groups and {learner.updates - larger} hold {small}"
        )
    low = recipe.rollout.mismatch_warn
    high = recipe.rollout.mismatch_stop
    if low is not None and high is not None and low > high:
        yield (
            f"rollout.mismatch_warn {low:g} is above rollout.mismatch_stop {high:g}: the run stops before it "
            "warns; lower mismatch_warn"
        )
    if recipe.data.eval is not None and recipe.eval.temperature == 0 and recipe.eval.n > 1:
        yield (
            f"eval.temperature is 0 and eval.n is {recipe.eval.n}: greedy completions are all equal; set "
            "eval.n and eval.k to 1"
        )


def dynamic_sampling_problems(recipe: SampledRecipe, rewards: Sequence[MethodUse]) -> Iterator[str]:
    """rewards: the registered reward functions. A user's function may report correctness as well."""
    if recipe.rollout.dynamic_sampling is None:
        return
    if recipe.rollout.n == 1:
        yield (
            "rollout.dynamic_sampling keeps prompts that are neither all right nor all wrong, which one "
            "completion cannot be; set rollout.n to at least 2, or rollout.dynamic_sampling to null"
        )
    has_user_rewards = len(rewards) < len(recipe.reward.functions)
    if not has_user_rewards and not any(reward.has(REPORTS_CORRECT) for reward in rewards):
        yield (
            "rollout.dynamic_sampling looks at raw correctness, which none of reward.functions reports "
            f"({', '.join(reward.name for reward in rewards)}); add one of "
            f"{', '.join(REWARDS.names_with(REPORTS_CORRECT))} (weight 0 if it must not count), or set "
            "rollout.dynamic_sampling to null"
        )
