"""The numbers that follow from a recipe that learns from judged completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rltrain.config.rules.offline import all_needs, takes_pairs
from rltrain.config.schema import OfflineRecipe
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.needs import MISMATCHED

__all__ = ["plan_offline"]


def plan_offline(recipe: OfflineRecipe) -> list[tuple[str, str, str]]:
    """(name, value, note) of each derived number.

    The number of examples is unknown until they are loaded.
    """
    data = recipe.data
    train = recipe.train
    ref = recipe.loss.preference
    spec = PREFERENCE_LOSSES.check(ref.name, ref.hp)
    pairs = takes_pairs(spec)
    unit, sides = ("pairs", 2) if pairs else ("completions", 1)
    sides += recipe.loss.degree is not None
    longest = sides * (data.max_prompt_tokens + data.max_completion_tokens)
    updates = f"{train.steps:,}" if train.steps else f"{train.epochs:g} x examples / {train.examples}"
    fits = recipe.learner.tokens_per_micro_batch // longest
    return [
        (
            "data: longest example",
            f"{longest:,}",
            f"tokens, of {'both completions with their prompt' if pairs else 'one completion'}"
            + (", and a degraded one" if recipe.loss.degree is not None else ""),
        ),
        ("frozen models: log-probs", *_frozen_models(recipe, all_needs(spec, ref.hp))),
        ("learner: updates in all", updates, "one per step"),
        (f"learner: {unit} per update", f"{train.examples:,}", "all ranks"),
        (
            f"learner: longest {unit} per micro-batch",
            f"{fits}",
            "of learner.tokens_per_micro_batch; more if they are shorter",
        ),
        *_sample_lines(recipe),
        (
            "eval: examples",
            f"{recipe.eval.examples:,}" if data.eval else "none",
            "at most" if data.eval else "data.eval is null",
        ),
    ]


def _sample_lines(recipe: OfflineRecipe) -> Iterator[tuple[str, str, str]]:
    if recipe.eval.samples:
        yield (
            "eval: completions written",
            f"{recipe.eval.samples:,}",
            f"each time, of at most {recipe.data.max_completion_tokens:,} tokens",
        )


def _frozen_models(recipe: OfflineRecipe, needs: frozenset[str]) -> tuple[str, str]:
    names = [name for name in ("ref_logp", "previous_logp") if name in needs]
    if MISMATCHED in needs:
        names = [*dict.fromkeys([*names, "ref_logp"]), "mismatched"]
    where = (
        "computed in every run"
        if recipe.reference.cache is None
        else f"computed once, stored in {recipe.reference.cache}"
    )
    return (" ".join(names), where) if names else ("none", "the loss needs none")
