"""Recipes that learn from pairs of the policy's own completions: their rules and derived numbers.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.composition import MethodUse
from rltrain.config.rules.findings import Findings
from rltrain.config.rules.offline import all_needs, data_needs
from rltrain.config.rules.registries import JUDGES
from rltrain.config.rules.sampling import (
    MethodLookup,
    dynamic_sampling_problems,
    sampling_problems,
    sampling_warnings,
)
from rltrain.config.schema import OnlinePairsRecipe
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.needs import (
    COMPARES_REWARDS,
    GAMMA_REQUIRED,
    PAIRS,
    PREVIOUS_LOGP,
    PREVIOUS_POLICY,
    REF_LOGP,
    SCALAR_HEAD,
)
from rltrain.registry import MethodSpec

__all__ = ["check_pairs", "pair_plan"]

_KEY = "loss.preference"
_FROM_ROLLOUTS = frozenset({"margin", "p_chosen"})


def check_pairs(recipe: OnlinePairsRecipe) -> Findings:
    """Applies the rules about pairs, their loss, sampling and rewards."""
    lookup = MethodLookup()
    ref = recipe.loss.preference
    judge = recipe.pairs.judge
    judge_use = lookup(JUDGES, "pairs.judge", judge)
    loss = lookup(PREFERENCE_LOSSES, _KEY, ref)
    problems = list(lookup.problems)
    if loss is not None:
        problems += [*_loss_problems(recipe, loss.spec), *_rollout_problems(recipe, judge_use)]
        problems += lookup.find_own_problems(recipe)

    sampling_lookup = MethodLookup()
    rewards = sampling_lookup.look_up_sampling(recipe)
    problems += [*sampling_lookup.problems, *sampling_problems(recipe)]
    if not sampling_lookup.problems:
        problems += dynamic_sampling_problems(recipe, rewards)
        problems += sampling_lookup.find_own_problems(recipe)
    if problems or loss is None:
        return Findings(problems, [])
    return Findings([], [*_warnings(recipe, loss.spec), *sampling_warnings(recipe)])


def _loss_problems(recipe: OnlinePairsRecipe, spec: MethodSpec) -> Iterator[str]:
    ref = recipe.loss.preference
    if PAIRS not in spec.traits or SCALAR_HEAD in spec.traits:
        suitable = [
            candidate.name
            for candidate in PREFERENCE_LOSSES.specs.values()
            if PAIRS in candidate.traits and SCALAR_HEAD not in candidate.traits
        ]
        yield (
            f"{_KEY} {spec.name} does not compare two completions of a language model; choose one of "
            f"{', '.join(suitable)}"
        )
        return

    if recipe.loss.degree is not None:
        yield (
            "loss.degree degrades the chosen completions of a data set, and kind online_pairs samples its "
            "own; leave it out"
        )
    if missing := sorted(data_needs(spec, ref.hp) - _FROM_ROLLOUTS):
        yield (
            f"{_KEY} {spec.name} needs {', '.join(missing)} from a data set, which rollouts do not have; "
            "choose another loss"
        )

    values = {name: item.default for name, item in spec.hyperparameters.items()} | ref.hp
    if GAMMA_REQUIRED in spec.traits and values["gamma"] is None:
        yield (
            f"{_KEY} {spec.name}: gamma has no default: a difference m of rewards becomes the target "
            "sigmoid(gamma m); set gamma"
        )

    needs = all_needs(spec, ref.hp)
    if recipe.train.previous_every > 1 and PREVIOUS_LOGP not in needs:
        yield (
            f"train.previous_every is {recipe.train.previous_every}, but {_KEY} {spec.name} reads no "
            "previous iterate; set it to 1"
        )
    judge = JUDGES.find(recipe.pairs.judge.name)
    judge_needs = frozenset() if judge is None else judge.needs_with(recipe.pairs.judge.hp)
    if recipe.model.reference is not None and REF_LOGP not in needs | judge_needs:
        yield f"model.reference is set, but {_KEY} {spec.name} has no reference model; leave it out"
    if recipe.model.teacher is not None:
        yield "model.teacher is set, but preference losses have no teacher; leave it out"


def _rollout_problems(recipe: OnlinePairsRecipe, judge: MethodUse | None) -> Iterator[str]:
    rollout = recipe.rollout
    pairs = recipe.pairs
    if rollout.n < 2:
        yield (
            f"rollout.n is {rollout.n}, but a pair takes two completions of a prompt; set rollout.n to at "
            "least 2"
        )
    for key in ("extra_samples", "environment", "adaptive_temperature"):
        if getattr(rollout, key):
            yield (
                f"rollout.{key} is set, but pairs are made of single answers that the policy gives at "
                "rollout.temperature; leave it out"
            )
    if rollout.trust_logp:
        yield (
            "rollout.trust_logp is true, but preference losses take no log-probs from the engine; set it to "
            "false"
        )

    longest = 2 * (recipe.data.max_prompt_tokens + rollout.max_tokens)
    if recipe.learner.tokens_per_micro_batch < longest:
        yield (
            f"learner.tokens_per_micro_batch is {recipe.learner.tokens_per_micro_batch}, but a pair, whose "
            "completions stay together, can take 2 x (data.max_prompt_tokens "
            f"{recipe.data.max_prompt_tokens} + rollout.max_tokens {rollout.max_tokens}) = {longest} tokens; "
            f"set learner.tokens_per_micro_batch to at least {longest}"
        )
    has_rewards = any(function.weight != 0 for function in recipe.reward.functions)
    if judge is not None and judge.has(COMPARES_REWARDS) and not has_rewards:
        yield (
            f"{judge} compares rewards, but every weight in reward.functions is 0; give one of them a weight"
        )
    if pairs.choose == "ranked" and pairs.verdict == "drawn":
        yield (
            "pairs.verdict is drawn, but pairs.choose ranked computes strengths that are no answers of the "
            "judge; set verdict to likelier"
        )


def _warnings(recipe: OnlinePairsRecipe, spec: MethodSpec) -> Iterator[str]:
    pairs = recipe.pairs
    rollout = recipe.rollout
    if PREVIOUS_POLICY not in spec.traits:
        return
    if pairs.choose != "disjoint":
        yield (
            f"{_KEY} {spec.name} fits the preference over the policy's samples, which takes independent "
            f"pairs; pairs.choose {pairs.choose} selects them by the verdict: set it to disjoint unless you "
            "follow a paper that does this"
        )
    if rollout.temperature != 1:
        yield (
            f"{_KEY} {spec.name} treats its samples as those of the previous iterate, whose log-probs are at "
            f"temperature 1, but rollout.temperature is {rollout.temperature:g}; set it to 1"
        )


def pair_plan(recipe: OnlinePairsRecipe) -> list[tuple[str, str, str]]:
    """(name, value, note) of each number that follows from the settings of pairs."""
    n = recipe.rollout.n
    prompts = recipe.rollout.prompts
    learner = recipe.learner
    ref = recipe.loss.preference
    pairs = {"disjoint": n // 2, "best_worst": 1, "ranked": n * (n - 1) // 2}[recipe.pairs.choose]
    comparisons = {"disjoint": n // 2, "best_worst": n * (n - 1) // 2, "ranked": n - 1}[recipe.pairs.choose]

    needs = all_needs(PREFERENCE_LOSSES.check(ref.name, ref.hp), ref.hp)
    frozen = [name for name in ("ref_logp", "previous_logp") if name in needs]
    models = 1 + (REF_LOGP in needs) + (recipe.train.previous_every > 1)

    return [
        (
            "pairs: per step, at most",
            f"{prompts * pairs:,}",
            f"{pairs} per prompt, pairs.choose {recipe.pairs.choose}; ties are left out",
        ),
        (
            "pairs: comparisons per step",
            f"{prompts * comparisons:,}",
            f"{comparisons} per prompt, put to the judge {recipe.pairs.judge.name}",
        ),
        ("pairs: per update, at most", f"{prompts * pairs / learner.updates:g}", "all ranks"),
        ("frozen models: log-probs", " ".join(frozen) or "none", f"{models} models in the learner's memory"),
    ]
