"""What a run works on: language, prompts and rewards, each tried out before any weight is loaded, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from reward.pool import RewardPool
from reward.resolve import RewardCall
from rltrain.build_environment import try_environment
from rltrain.config.schema import Recipe, RewardStage
from rltrain.data.language import Language, load_language, sizes_of
from rltrain.data.order import PromptOrder
from rltrain.data.prompts import PromptSet, load_prompts, without
from rltrain.learner.frozen import require_companion
from rltrain.learner.loading import Head, require_weights
from rltrain.learner.process_reward import POLICY
from rltrain.rollout.producer import sample_inputs
from rltrain.round_trip import LOSSY
from rltrain.seeds import stable_hash
from rltrain.types import Prompt

REWARD_MODEL = "reward_model"  # the reward that no process of the pool computes, but the learner's own


@dataclass(frozen=True)
class Materials:
    """What a run works on, loaded and checked before any weight is."""

    language: Language
    train: PromptSet
    held_out: PromptSet | None
    grader: RewardPool


def prepare(recipe: Recipe) -> Materials:
    """Tokenizer, prompts and rewards, each tried out. Raises ValueError or OSError on what a user can mend."""
    language, sizes = load_language(recipe), sizes_of(recipe)
    require_weights(recipe.model.path, recipe.model.revision, "logits")
    for key, path, head in beside(recipe):
        require_companion(language.tokenizer, recipe.model.path, key, path, head=head, sizes=sizes)
    training = load_prompts(recipe.data, "train", language.tokenizer, seed=recipe.seed, limit=recipe.data.max_prompts)
    held_out = None
    if recipe.data.eval is not None:
        everything = load_prompts(recipe.data, "eval", language.tokenizer, seed=recipe.seed)
        training = without(training, everything)
        chosen = Random(stable_hash(recipe.seed, "held out")).sample(everything.prompts, min(recipe.eval.prompts, len(everything)))
        held_out = PromptSet(tuple(chosen), everything.dropped, everything.lossy)
    everything = training.prompts + (() if held_out is None else held_out.prompts)
    language.require_embedded((f"prompt {prompt.id}", prompt.token_ids) for prompt in everything)
    PromptOrder(len(training), recipe.rollout.prompts, recipe.seed)  # refuses a data set smaller than a step
    try_environment(recipe, language, training.prompts[0])
    columns_for_models(recipe, everything)
    grader = build_grader(recipe.reward, recipe.train.deadline_seconds)
    try:
        grader.check(sample_inputs(training.prompts[0], in_environment=recipe.rollout.environment is not None))
    except BaseException:
        grader.close()
        raise
    return Materials(language, training, held_out, grader)


def beside(recipe: Recipe) -> Iterator[tuple[str, str, Head]]:
    """(key, path, kind of head) of every model that reads the policy's tokens."""
    settings = recipe.process_reward
    named = {"model.reference": recipe.model.reference, "model.teacher": recipe.model.teacher}
    if settings is not None:
        reference = None if settings.reference == POLICY else settings.reference
        named |= {"process_reward.path": settings.path, "process_reward.reference": reference}
    for key, path in named.items():
        if path is not None:
            yield key, path, "logits"
    for at, ref in enumerate(recipe.reward.functions):
        if ref.name == REWARD_MODEL and ref.hp.get("prompt_column") is None:
            yield f"reward.functions.{at}.path", ref.hp["path"], "scalar"


def columns_for_models(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError where a reward model is to read a column that a row lacks."""
    columns = [ref.hp.get("prompt_column") for ref in recipe.reward.functions if ref.name == REWARD_MODEL]
    for column in (str(one) for one in columns if one is not None):
        for prompt in prompts:
            if not isinstance(prompt.columns.get(column), str | list):
                there = ", ".join(sorted(prompt.columns)) or "none"
                raise ValueError(
                    f"reward_model: prompt_column is {column!r}, and {prompt.id} has no text or messages there; its columns are: {there}. "
                    f"Keep the prompt under a second name, as in data.columns {{prompt: question, {column}: question}}"
                )


def build_grader(stage: RewardStage, deadline_seconds: float) -> RewardPool:
    """The rewards that run in processes of their own."""
    calls = [RewardCall(ref.name, ref.weight, ref.hp) for ref in stage.functions if ref.name != REWARD_MODEL]
    calls = calls or [RewardCall("none", 0.0, {})]
    return RewardPool(calls, workers=stage.workers, seconds=stage.seconds, memory_gib=stage.memory_gib, deadline_seconds=deadline_seconds)


def describe(materials: Materials) -> Iterator[str]:
    """What was loaded and what was dropped, one line each."""
    for name, prompts in (("training", materials.train), ("held-out", materials.held_out)):
        if prompts is not None:
            dropped = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items() if count)
            yield f"{name} prompts: {len(prompts)}" + (f" (left out: {dropped})" if dropped else "")
            if prompts.lossy:
                yield f"warning: {prompts.lossy} {name} prompts {LOSSY}"
    if materials.language.endings.pad_is_eos:
        yield "the tokenizer names no pad token: EOS fills rows (masks come from lengths, so nothing is lost)"
