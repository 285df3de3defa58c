"""Rules across sections of a recipe that learns from judged completions. Imports no torch.

Properties of the data (available columns, balance of classes) are checked when the data are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rltrain.config.rules.adapter import scalar_head_problem
from rltrain.config.rules.findings import Findings
from rltrain.config.rules.optimizer import optimizer_problems
from rltrain.config.schema import SUPERVISED_LOSS, OfflineRecipe
from rltrain.config.user_files import check_method
from rltrain.loss.preference import PREFERENCE_LOSSES, STATISTICS
from rltrain.needs import GAMMA_REQUIRED, MARGIN, MISMATCHED, PAIRS, PREVIOUS_LOGP, REF_LOGP, SCALAR_HEAD
from rltrain.registry import MethodSpec, suggestion

_KEY = "loss.preference"
_PAIR_COLUMNS = frozenset(
    {
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
        "chosen_rating",
        "rejected_rating",
        "margin",
        "p_chosen",
    }
)
_LABEL_COLUMNS = frozenset({"completion", "label"})


def check_offline(recipe: OfflineRecipe) -> Findings:
    """All problems and warnings that are known before anything is loaded."""
    ref = recipe.loss.preference
    try:
        spec = check_method(PREFERENCE_LOSSES, ref)
    except ValueError as error:
        return Findings([f"{_KEY}: {error}"], [])
    values = spec.values_with(ref.hp)
    problems = [
        *_size_problems(recipe, spec),
        *_loss_problems(recipe, spec, values),
        *_model_problems(recipe, spec),
    ]
    problems += [*_eval_problems(recipe, spec), *_degree_problems(recipe, spec)]
    problems += scalar_head_problem(recipe, spec.traits)
    own_problems = PREFERENCE_LOSSES.find_problems(ref.name, ref.hp, recipe)
    problems += [f"{_KEY} {spec.name}: {problem}" for problem in own_problems]
    problems += optimizer_problems("learner.optimizer", recipe.learner.optimizer)
    return Findings(problems, [] if problems else list(_warnings(recipe, spec)))


def data_needs(spec: MethodSpec, hp: Mapping[str, Any]) -> frozenset[str]:
    """What the loss needs from the data: "margin", "p_chosen", "label" and "column:<name>", including the
    needs of its statistics.
    """
    needs = all_needs(spec, hp)
    return frozenset(
        name for name in needs if name in ("margin", "p_chosen", "label") or name.startswith("column:")
    )


def all_needs(spec: MethodSpec, hp: Mapping[str, Any]) -> frozenset[str]:
    """Every tensor that the loss needs; a statistic is replaced by the tensors that it needs."""
    needs = spec.needs_with(hp)
    known = set(STATISTICS.names())
    return (needs - known).union(*(STATISTICS.spec(name).needs for name in needs & known))


def takes_pairs(spec: MethodSpec) -> bool:
    return PAIRS in spec.traits


def _size_problems(recipe: OfflineRecipe, spec: MethodSpec) -> Iterator[str]:
    data = recipe.data
    learner = recipe.learner
    sides = 2 if takes_pairs(spec) else 1
    sides += recipe.loss.degree is not None
    longest = sides * (data.max_prompt_tokens + data.max_completion_tokens)
    if learner.tokens_per_micro_batch < longest:
        what = "one completion" if sides == 1 else "a pair, whose completions stay together,"
        yield (
            f"learner.tokens_per_micro_batch is {learner.tokens_per_micro_batch}, but {what} can take "
            f"{f'{sides} x ' if sides > 1 else ''}(data.max_prompt_tokens {data.max_prompt_tokens} + "
            f"data.max_completion_tokens {data.max_completion_tokens}) = {longest} tokens; set "
            f"learner.tokens_per_micro_batch to at least {longest}"
        )


def _loss_problems(recipe: OfflineRecipe, spec: MethodSpec, values: Mapping[str, Any]) -> Iterator[str]:
    if recipe.kind == "sft" and spec.name != SUPERVISED_LOSS:
        yield (
            f"kind is sft, whose loss is {SUPERVISED_LOSS}, but {_KEY} is {spec.name}; leave the loss out, "
            "or write kind: offline for a preference loss"
        )
    if GAMMA_REQUIRED in spec.traits and values["gamma"] is None:
        yield (
            f"{_KEY} {spec.name}: gamma has no default, it carries the units of the scores: with gamma g a "
            "margin m becomes the target sigmoid(g m); set gamma (2.2 for scores from 1 to 10 in the "
            "authors' UltraFeedback commands)"
        )
    mapped = recipe.data.columns.keys()
    strange = mapped & (_LABEL_COLUMNS if takes_pairs(spec) else frozenset())
    if strange and not mapped & _PAIR_COLUMNS:
        yield (
            f"data.columns names {', '.join(sorted(strange))}, but {_KEY} {spec.name} compares two "
            "completions of a prompt (columns chosen and rejected); choose a loss for single "
            f"completions{suggestion('kto', ['kto'])}, or another data set"
        )
    if recipe.data.divide_margins_by != "nothing" and MARGIN not in data_needs(spec, values):
        yield (
            f"data.divide_margins_by is {recipe.data.divide_margins_by}, but {_KEY} {spec.name} reads no "
            "margins: it would change nothing; set it to nothing"
        )


def _degree_problems(recipe: OfflineRecipe, spec: MethodSpec) -> Iterator[str]:
    if recipe.loss.degree is None:
        return
    if not takes_pairs(spec) or SCALAR_HEAD in spec.traits:
        what = "trains a scalar head" if SCALAR_HEAD in spec.traits else "learns from single completions"
        yield (
            f"loss.degree degrades the chosen completions of pairs, but {_KEY} {spec.name} {what}; leave it "
            "out, or choose a loss on pairs that trains a language model"
        )


def _model_problems(recipe: OfflineRecipe, spec: MethodSpec) -> Iterator[str]:
    needs = all_needs(spec, recipe.loss.preference.hp)
    model = recipe.model
    if PREVIOUS_LOGP not in needs and model.previous is not None:
        yield f"model.previous is set, but {_KEY} {spec.name} reads no previous iterate; leave it out"
    if REF_LOGP not in needs and model.reference is not None:
        yield f"model.reference is set, but {_KEY} {spec.name} has no reference model; leave it out"


def _eval_problems(recipe: OfflineRecipe, spec: MethodSpec) -> Iterator[str]:
    settings = recipe.eval
    if settings.gamma is not None and not takes_pairs(spec):
        yield (
            f"eval.gamma is {settings.gamma:g}, but {_KEY} {spec.name} learns from single completions, which "
            "have no margin; leave it out"
        )
    if settings.samples and recipe.data.eval is None:
        yield (
            f"eval.samples is {settings.samples}, but data.eval is null, so there are no held-out prompts; "
            "set data.eval or leave it out"
        )
    if settings.spectrum and (SCALAR_HEAD in spec.traits or recipe.data.eval is None):
        why = "data.eval is null" if recipe.data.eval is None else f"{_KEY} {spec.name} trains a scalar head"
        yield f"eval.spectrum is of a language model's states on held-out examples, but {why}; leave it out"
    if settings.samples and SCALAR_HEAD in spec.traits:
        yield (
            f"eval.samples is {settings.samples}, but {_KEY} {spec.name} trains a scalar head, which writes "
            "no text; leave it out"
        )


def _warnings(recipe: OfflineRecipe, spec: MethodSpec) -> Iterator[str]:
    if recipe.learner.optimizer.lr == 0:
        yield (
            "learner.optimizer.lr is 0: the weights never change; set a learning rate unless that is what "
            "you test"
        )
    steps = recipe.train.steps
    if steps is not None and recipe.learner.optimizer.warmup_steps > steps:
        yield (
            f"learner.optimizer.warmup_steps is {recipe.learner.optimizer.warmup_steps} but train.steps is "
            f"{steps}: the learning rate never reaches {recipe.learner.optimizer.lr:g}"
        )
    if steps is not None and recipe.train.epochs != 1.0:
        yield (
            f"train.steps is {steps}, so train.epochs {recipe.train.epochs:g} is not read; set train.steps "
            "to null to count epochs"
        )
    if (
        not takes_pairs(spec)
        and recipe.train.examples < 8
        and MISMATCHED in all_needs(spec, recipe.loss.preference.hp)
    ):
        yield (
            f"train.examples is {recipe.train.examples}: {_KEY} {spec.name} estimates a mean over the step's "
            "examples; the authors use 8 to 128, set at least 8"
        )
