"""The inputs of a run on sampled completions: tokenizer, prompts and rewards.

Each is checked before any weight is loaded, the cheapest check first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch

from rltrain.build.environment import check_environment
from rltrain.config.schema import Data, ProcessReward, RewardStage, Rollout, SampledRecipe
from rltrain.data.order import PromptOrder
from rltrain.data.prompts import PromptSet, load_prompts, without_prompts
from rltrain.data.tokenization import Tokenization, load_model_config, load_tokenization, sizes_of
from rltrain.errors import UserError
from rltrain.learner.frozen_models import require_companion
from rltrain.learner.loading import Head, require_weights
from rltrain.learner.process_reward import POLICY
from rltrain.model_limits import decoding_limit
from rltrain.reward.pool import RewardPool
from rltrain.reward.resolve import RewardCall
from rltrain.rollout.grading import sample_inputs
from rltrain.rollout.worker.flags import require_known_version, require_sound_guesses
from rltrain.round_trip import LOSSY
from rltrain.seeds import stable_hash
from rltrain.types.samples import Prompt

REWARD_MODEL = "reward_model"  # the only reward that the learner's process computes, not the reward pool


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run on sampled completions, loaded and checked before any weight."""

    tokenization: Tokenization
    train: PromptSet
    held_out: PromptSet | None
    grader: RewardPool


def load_inputs(recipe: SampledRecipe, models: Mapping[str, str | None] | None = None) -> RunInputs:
    """Loads tokenizer, prompts and rewards, and tries each. Raises ValueError or OSError for a mistake that
    the user can correct.

    models: by recipe key, further models that read the policy's tokens.
    """
    data = recipe.data
    rollout = recipe.rollout
    require_workers(rollout)
    tokenization = load_tokenization(recipe.model, data, rollout)
    sizes = sizes_of(data, rollout)
    require_weights(recipe.model.path, recipe.model.revision, "logits", recipe.model.attention)
    for key, path, head in _models_sharing_tokenizer(recipe, models or {}):
        require_companion(tokenization.tokenizer, recipe.model.path, key, path, head=head, sizes=sizes)

    train, held_out = _load_prompt_sets(data, recipe.eval.prompts, recipe.seed, tokenization)
    PromptOrder(len(train), rollout.prompts, recipe.seed)  # refuses a data set smaller than a step
    every_prompt = train.prompts + (() if held_out is None else held_out.prompts)
    tokenization.require_embedded((f"prompt {prompt.id}", prompt.token_ids) for prompt in every_prompt)
    require_decodable(recipe, every_prompt)
    check_environment(data, rollout.environment, tokenization, train.prompts[0])
    check_reward_model_columns(recipe.reward, every_prompt)

    grader = build_grader(recipe.reward, recipe.train.deadline_seconds)
    try:
        grader.check(sample_inputs(train.prompts[0], in_environment=rollout.environment is not None))
    except BaseException:
        grader.close()
        raise
    return RunInputs(tokenization, train, held_out, grader)


def require_workers(rollout: Rollout) -> None:
    """Raises UserError where this machine cannot start the recipe's workers, or they would sample wrongly."""
    if rollout.engine != "vllm_server":
        return
    if rollout.server.url is None and (rollout.workers is None or rollout.workers.count is not None):
        require_known_version()
    require_sound_guesses(rollout.server, on_gpu=torch.cuda.is_available())


def require_decodable(recipe: SampledRecipe, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where the engine inside this process cannot decode the longest prompt's answer."""
    if recipe.rollout.engine != "transformers":
        return
    limit = decoding_limit(load_model_config(recipe.model), recipe.model.path)
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    tokens = len(longest.token_ids) + recipe.rollout.max_tokens
    if tokens > limit.tokens:
        room = limit.tokens - recipe.rollout.max_tokens
        raise UserError(
            f"prompt {longest.id!r} has {len(longest.token_ids)} tokens and rollout.max_tokens is "
            f"{recipe.rollout.max_tokens}: together over the {limit.tokens} of {limit.why}; lower "
            f"data.max_prompt_tokens to {room} or less, which leaves such prompts out, or rollout.max_tokens"
        )


def _load_prompt_sets(
    data: Data, count: int, seed: int, tokenization: Tokenization
) -> tuple[PromptSet, PromptSet | None]:
    """The training prompts, and ``count`` held-out prompts that are not among them; None if the
    recipe has no held-out data.
    """
    train = load_prompts(data, "train", tokenization.tokenizer, seed=seed, limit=data.max_prompts)
    if data.eval is None:
        return train, None
    candidates = load_prompts(data, "eval", tokenization.tokenizer, seed=seed)
    train = without_prompts(train, candidates)
    chosen = Random(stable_hash(seed, "held out")).sample(candidates.prompts, min(count, len(candidates)))
    return train, PromptSet(tuple(chosen), candidates.dropped, candidates.lossy)


def process_reward_models(settings: ProcessReward | None) -> dict[str, str | None]:
    """The models of ``process_reward``, by recipe key."""
    if settings is None:
        return {}
    reference = None if settings.reference == POLICY else settings.reference
    return {"process_reward.path": settings.path, "process_reward.reference": reference}


def _models_sharing_tokenizer(
    recipe: SampledRecipe, models: Mapping[str, str | None]
) -> Iterator[tuple[str, str, Head]]:
    """(key, path, kind of head) of every model that reads the policy's tokens."""
    named = {"model.reference": recipe.model.reference, "model.teacher": recipe.model.teacher, **models}
    for key, path in named.items():
        if path is not None:
            yield key, path, "logits"
    for number, ref in enumerate(recipe.reward.functions):
        if ref.name == REWARD_MODEL and ref.hp.get("prompt_column") is None:
            yield f"reward.functions.{number}.path", ref.hp["path"], "scalar"


def check_reward_model_columns(stage: RewardStage, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if a reward model reads a column that some row lacks."""
    names = [ref.hp.get("prompt_column") for ref in stage.functions if ref.name == REWARD_MODEL]
    columns = [str(name) for name in names if name is not None]
    for column in columns:
        for prompt in prompts:
            if not isinstance(prompt.columns.get(column), str | list):
                present = ", ".join(sorted(prompt.columns)) or "none"
                raise ValueError(
                    f"reward_model: prompt_column is {column!r}, and {prompt.id} has no text or messages "
                    f"there; its columns are: {present}. "
                    f"Keep the prompt under a second name, as in data.columns {{prompt: question, {column}: "
                    "question}"
                )


def build_grader(stage: RewardStage, deadline_seconds: float) -> RewardPool:
    """The rewards that run in separate processes."""
    calls = [RewardCall(ref.name, ref.weight, ref.hp) for ref in stage.functions if ref.name != REWARD_MODEL]
    return RewardPool(
        calls or [RewardCall("none", 0.0, {})],
        workers=stage.workers,
        seconds=stage.seconds,
        memory_gib=stage.memory_gib,
        deadline_seconds=deadline_seconds,
    )


def summarize(inputs: RunInputs) -> Iterator[str]:
    """How many prompts were loaded and dropped, one line per set, and warnings."""
    for name, prompts in (("training", inputs.train), ("held-out", inputs.held_out)):
        if prompts is not None:
            dropped = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items() if count)
            yield f"{name} prompts: {len(prompts)}" + (f" (left out: {dropped})" if dropped else "")
            if prompts.lossy:
                yield f"warning: {prompts.lossy} {name} prompts {LOSSY}"
    if inputs.tokenization.stop_tokens.pad_is_eos:
        yield "the tokenizer names no pad token: EOS fills rows (masks come from lengths, so nothing is lost)"
