"""Rules about coefficients that change, and about recipes that learn without a reward.

Called by ``config/check.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.composition import Methods, MethodUse
from rltrain.config.schema import MethodRef, OnlineRecipe
from rltrain.control import COEFFICIENTS
from rltrain.loss import LOSS_TERMS

_GIVES = "gives_"  # a controller's trait: what it tells its term beside the coefficient

_ANSWERING = frozenset(
    {"math_answer", "exact", "choice", "empo"}
)  # rewards that extract the answers they judge


def coefficient_problems(recipe: OnlineRecipe) -> Iterator[str]:
    """Names, hyperparameters and inputs of every controller, which is made once to hear what it says
    itself.
    """
    for number, term in enumerate(recipe.loss.terms):
        key = f"loss.terms.{number}.coefficient"
        offered: set[str] = set()
        if isinstance(term.coefficient, MethodRef):
            try:
                bound = COEFFICIENTS.bind(term.coefficient.name, term.coefficient.hp)
                bound(**dict.fromkeys(bound.spec.inputs, recipe.train.steps))
            except ValueError as error:
                yield f"{key}: {error}"
                continue
            offered = {trait.removeprefix(_GIVES) for trait in bound.spec.traits if trait.startswith(_GIVES)}
            yield from _metric_problems(recipe, key, str(_value(term.coefficient, "metric")))
        if term.name not in LOSS_TERMS.names():
            continue  # said elsewhere
        wanted = set(LOSS_TERMS.spec(term.name).inputs)
        if wanted - offered:
            names = ", ".join(sorted(wanted))
            givers = [
                name
                for name in COEFFICIENTS.names()
                if {f"{_GIVES}{one}" for one in wanted} <= COEFFICIENTS.spec(name).traits
            ]
            yield (
                f"{key}: term {term.name} gets {names} from its coefficient's controller, and this one does "
                "not give it; "
                f"set it to {{name: {' or '.join(givers)}}}"
            )
        if offered - wanted:
            names = ", ".join(sorted(offered))
            yield (
                f"{key}: the controller gives {names}, which term {term.name} does not take; choose another "
                "controller"
            )


def _value(ref: MethodRef, name: str) -> object:
    parameter = COEFFICIENTS.spec(ref.name).hyperparameters.get(name)
    return ref.hp.get(name, None if parameter is None else parameter.default)


def _metric_problems(recipe: OnlineRecipe, key: str, metric: str) -> Iterator[str]:
    """A metric of a loss term is there only where the recipe has the term."""
    used = {term.name for term in recipe.loss.terms}
    owners = [
        name for name in LOSS_TERMS.names() if metric == f"loss/{name}" or metric.startswith(f"loss/{name}_")
    ]
    if owners and not used & set(owners):
        yield (
            f"{key}: the controller lives on the metric {metric}, which only a term {owners[-1]} reports; "
            f"add the term or name another metric"
        )


def reward_problems(recipe: OnlineRecipe, methods: Methods) -> Iterator[str]:
    """What says that rewards teach nothing must be said everywhere, or nowhere."""
    policy, weights = methods.policy, [function.weight for function in recipe.reward.functions]
    free = "reward_free" in policy.spec.traits | methods.advantage.spec.traits
    if "reward_free" in policy.spec.traits:
        if methods.advantage.name != "none":
            yield (
                f"loss.policy {policy.name} reads no advantage, but advantage is {methods.advantage.name}; "
                "set advantage to none"
            )
        heard = [
            function.name
            for function in recipe.reward.functions
            if function.weight != 0 and function.name != "none"
        ]
        if heard:
            yield (
                f"loss.policy {policy.name} reads no reward, but reward.functions gives {', '.join(heard)} a "
                "weight; set weight to 0: "
                f"it is then graded and reported, and teaches nothing"
            )
        if recipe.rollout.dynamic_sampling is not None:
            yield (
                f"loss.policy {policy.name} reads no reward, but rollout.dynamic_sampling chooses prompts by "
                "it; set it to null"
            )
        return
    if methods.advantage.name == "none" and not methods.terms:
        yield (
            f"advantage is none: loss.policy {policy.name} would learn nothing; set advantage to one that "
            "reads the rewards"
        )
    if not free and all(weight == 0 for weight in weights):
        yield "reward.functions: every weight is 0, so every completion scores 0; give one of them a weight"


def verdict_problems(recipe: OnlineRecipe, methods: Methods, reporting: frozenset[str]) -> Iterator[str]:
    """Methods that go by right and wrong, or by answers, need a reward function that says which.
    reporting: ours that judge.
    """
    users = len(methods.rewards) < len(recipe.reward.functions)
    chosen: tuple[MethodUse, ...] = (methods.advantage, *methods.controls, methods.policy, *methods.terms)
    for one in chosen:
        if (
            "needs_correct" in one.spec.traits
            and not users
            and not reporting & {reward.name for reward in methods.rewards}
        ):
            yield (
                f"{one.key} {one.name} goes by right and wrong, which none of reward.functions reports; "
                f"add one of {', '.join(sorted(reporting))} (weight 0 if it must not count)"
            )
        if (
            "answer" in one.spec.needs
            and not users
            and not _ANSWERING & {reward.name for reward in methods.rewards}
        ):
            yield (
                f"{one.key} {one.name} compares the completions' answers, which none of reward.functions "
                "extracts; "
                f"add one of {', '.join(sorted(_ANSWERING))} (weight 0 if it must not count)"
            )
        for term in sorted(
            trait.removeprefix("loss_term:") for trait in one.spec.traits if trait.startswith("loss_term:")
        ):
            if term not in {term.name for term in methods.terms}:
                yield (
                    f"{one.key} {one.name} marks tokens for the term {term}, which loss.terms has not; add "
                    f"it or drop {one.name}"
                )
