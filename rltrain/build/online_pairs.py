"""Builds the run of a recipe that learns from pairs of the policy's own completions.

``build/rollout.py`` builds the parts that sample and grade.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

from torch import Tensor

from rltrain.build.context import RunContext
from rltrain.build.engine_share import rollout_beside
from rltrain.build.inputs import RunInputs
from rltrain.build.outputs import TrainingState, build_outputs, initial_model, resume, saved_adapter
from rltrain.build.recomputation import recompute_what_must_be
from rltrain.build.rollout import build_rollout
from rltrain.checkpoint.random_state import seed_everything
from rltrain.config.rules.registries import JUDGES
from rltrain.config.schema import Data, MethodRef, Model, OnlinePairsRecipe, Pairs, PairTrain, RolloutLearner
from rltrain.data.chat import render, template_inputs
from rltrain.data.tokenization import Tokenization, sizes_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen_models import require_companion
from rltrain.learner.pair_learner import PairLearner
from rltrain.learner.reward_model import RewardModel
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.model_limits import context_of
from rltrain.needs import REF_LOGP
from rltrain.process import Process
from rltrain.rollout.pairs.judges import JudgeContext
from rltrain.rollout.pairs.pairing import Pairing
from rltrain.train.online_pairs import PairRun
from rltrain.types.policy import TokenRows

__all__ = ["build_pair_run", "build_pairing"]


def build_pair_run(recipe: OnlinePairsRecipe, inputs: RunInputs, context: RunContext) -> PairRun:
    """Loads weights and starts the engine."""
    seed_everything(recipe.seed)
    ref = recipe.loss.preference
    objective = PreferenceObjective(PREFERENCE_LOSSES.bind(ref.name, ref.hp))
    learner = build_pair_learner(
        recipe.model,
        recipe.learner,
        recipe.train,
        recipe.rollout.temperature,
        recipe.pairs.judge,
        objective.needs,
        recipe.seed,
        context,
    )
    rollout = build_rollout(inputs, learner, context, recipe, rollout_beside(recipe, learner.trained))
    recompute_what_must_be(recipe, [learner.trained])
    pairing = build_pairing(
        recipe.pairs,
        recipe.model,
        recipe.data,
        inputs.tokenization,
        learner,
        context.process,
        sizes_of(recipe.data, recipe.rollout),
        recipe.seed,
    )

    state = TrainingState(learner, rollout.source, rollout.sync)
    resumed = resume(context.checkpoint, state)
    reporter, writer = build_outputs(
        recipe, context, recipe.train.steps, resumed, inputs.tokenization, learner, state.state_dict
    )
    return PairRun(
        recipe=recipe,
        total_steps=recipe.train.steps,
        learner=learner,
        source=rollout.source,
        sync=rollout.sync,
        evaluator=rollout.evaluator,
        pairing=pairing,
        objective=objective,
        mismatch=rollout.mismatch,
        reporter=reporter,
        writer=writer,
        resumed=resumed,
        should_stop=context.should_stop,
    )


def build_pair_learner(
    model: Model,
    settings: RolloutLearner,
    train: PairTrain,
    temperature: float,
    judge: MethodRef,
    needs: frozenset[str],
    seed: int,
    context: RunContext,
) -> PairLearner:
    """The learner with the weights of ``model``, or those of the checkpoint, and the frozen models that loss
    and judge need.

    needs: the statistics that the loss needs.
    """
    learner = PairLearner(
        initial_model(model, context.checkpoint),
        settings,
        temperature=temperature,
        total_updates=train.steps * settings.updates * settings.epochs,
        seed=seed,
        adapter_from=saved_adapter(model, context.checkpoint),
        deadline=context.process.deadline,
    )
    if REF_LOGP in needs | JUDGES.spec(judge.name).needs_with(judge.hp):
        learner.use_frozen("ref_logp", model.reference, model)
    if train.previous_every > 1:
        learner.keep_iterate(model)
    return learner


def build_pairing(
    settings: Pairs,
    model: Model,
    data: Data,
    tokenization: Tokenization,
    learner: PairLearner,
    process: Process,
    sizes: Mapping[str, int],
    seed: int,
) -> Pairing:
    """The judge, and how its verdicts make pairs. Raises UserError if the judge cannot be loaded.

    sizes: the most tokens of each part of a row, by recipe key.
    """
    max_batch_tokens = learner.trained.settings.tokens_per_micro_batch

    def log_probs(rows: TokenRows, by: Literal["policy", "reference"]) -> Tensor:
        frozen = learner.frozen["ref_logp"] if by == "reference" else None
        return learner.log_probs(rows, sides=2, frozen=frozen)

    def render_prompt(text: str) -> list[int]:
        _, token_ids = render(
            text,
            tokenization.tokenizer,
            system=None,
            chat_template=data.chat_template,
            date=data.date,
            inputs=template_inputs({}, data),
        )
        return token_ids

    context = context_of(learner.model.config)
    judge_context = JudgeContext(
        log_probs=log_probs,
        render=render_prompt,
        decode=tokenization.decode,
        word=partial(first_token, tokenization),
        reward_model=partial(
            RewardModel, device=learner.device, tokens_per_micro_batch=max_batch_tokens, date=data.date
        ),
        rank=process.rank,
        ranks=process.world_size,
        gather=process.gather,
        max_tokens=max_batch_tokens // 2 if context is None else min(context.tokens, max_batch_tokens // 2),
    )
    with user_mistakes():
        path = settings.judge.hp.get("path")
        column = settings.judge.hp.get("prompt_column")
        if settings.judge.name == "reward_model" and path and column is None:
            require_companion(
                tokenization.tokenizer,
                model.path,
                "pairs.judge.path",
                path,
                head="scalar",
                sizes=sizes,
            )
        judge = JUDGES.bind(settings.judge.name, settings.judge.hp)(judge_context)
    return Pairing(judge, settings.choose, settings.verdict, settings.tolerance, seed)


def first_token(tokenization: Tokenization, word: str) -> int:
    """The first token of the reply ``word``."""
    tokens = tokenization.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"the tokenizer has no token for {word!r}; give the judge another word")
    return int(tokens[0])
