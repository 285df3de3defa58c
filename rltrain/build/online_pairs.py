"""Builds the run of a recipe that learns from pairs of the policy's own completions.

``build/rollout.py`` builds the parts that sample and grade.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from rltrain.build.context import RunContext
from rltrain.build.inputs import RunInputs
from rltrain.build.outputs import TrainingState, build_model_writer, build_reporter, initial_model
from rltrain.build.rollout import build_rollout
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_state import read_state, restoring
from rltrain.config.rules.registries import JUDGES
from rltrain.config.schema import OnlinePairsRecipe
from rltrain.data.chat import render
from rltrain.data.tokenization import Tokenization, sizes_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen_models import require_companion
from rltrain.learner.pair_learner import PairLearner
from rltrain.learner.reward_model import RewardModel
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.model_limits import context_of
from rltrain.process import Process
from rltrain.rollout.pairs.judges import JudgeContext
from rltrain.rollout.pairs.pairing import Pairing
from rltrain.train.online_pairs import PairRun
from rltrain.types.policy import TokenRows

__all__ = ["build_pair_run", "build_pairing"]


def build_pair_run(recipe: OnlinePairsRecipe, inputs: RunInputs, context: RunContext) -> PairRun:
    """Loads weights and starts the engine."""
    seed_everything(recipe.seed)
    process = context.process
    ref = recipe.loss.preference
    objective = PreferenceObjective(PREFERENCE_LOSSES.bind(ref.name, ref.hp))
    learner = build_pair_learner(recipe, objective, context.checkpoint, process)
    inputs.grader.log_to(context.folder.rewards_log(process.rank))
    rollout = build_rollout(recipe, inputs, learner, process, fresh=context.is_fresh)
    pairing = build_pairing(recipe, inputs.tokenization, learner, process)

    state = TrainingState(learner, rollout.source, rollout.sync)
    resumed = None if context.checkpoint is None else read_state(context.checkpoint)
    if resumed is not None and context.checkpoint is not None:
        with restoring(context.checkpoint):
            state.load_state_dict(resumed)
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
        reporter=build_reporter(recipe, context, recipe.train.steps, resumed, recipe.report.transcripts),
        writer=build_model_writer(recipe, inputs.tokenization, learner, state.state_dict, context),
        resumed=resumed,
        should_stop=context.should_stop,
    )


def build_pair_learner(
    recipe: OnlinePairsRecipe, objective: PreferenceObjective, checkpoint: Path | None, process: Process
) -> PairLearner:
    """The learner with the recipe's weights, or those of ``checkpoint``, and the frozen models that loss
    and judge need.
    """
    settings = recipe.learner
    model = recipe.model
    learner = PairLearner(
        initial_model(model, checkpoint),
        settings,
        temperature=recipe.rollout.temperature,
        total_updates=recipe.train.steps * settings.updates * settings.epochs,
        seed=recipe.seed,
        deadline=process.deadline,
    )
    judge = recipe.pairs.judge
    if "ref_logp" in objective.needs | JUDGES.spec(judge.name).needs_with(judge.hp):
        learner.use_frozen("ref_logp", model.reference, model)
    if recipe.train.previous_every > 1:
        learner.keep_iterate(model)
    return learner


def build_pairing(
    recipe: OnlinePairsRecipe, tokenization: Tokenization, learner: PairLearner, process: Process
) -> Pairing:
    """The judge, and how its verdicts make pairs. Raises UserError if the judge cannot be loaded."""
    settings = recipe.pairs
    max_batch_tokens = recipe.learner.tokens_per_micro_batch

    def log_probs(rows: TokenRows, by: Literal["policy", "reference"]) -> Tensor:
        frozen = learner.frozen["ref_logp"] if by == "reference" else None
        return learner.log_probs(rows, sides=2, frozen=frozen)

    def render_prompt(text: str) -> list[int]:
        _, token_ids = render(
            text,
            tokenization.tokenizer,
            system=None,
            chat_template=recipe.data.chat_template,
            date=recipe.data.date,
        )
        return token_ids

    context = context_of(learner.model.config)
    judge_context = JudgeContext(
        log_probs=log_probs,
        render=render_prompt,
        decode=tokenization.decode,
        word=partial(first_token, tokenization),
        reward_model=partial(
            RewardModel, device=learner.device, tokens_per_micro_batch=max_batch_tokens, date=recipe.data.date
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
                recipe.model.path,
                "pairs.judge.path",
                path,
                head="scalar",
                sizes=sizes_of(recipe.data, recipe.rollout),
            )
        judge = JUDGES.bind(settings.judge.name, settings.judge.hp)(judge_context)
    return Pairing(judge, settings.choose, settings.verdict, settings.tolerance, recipe.seed)


def first_token(tokenization: Tokenization, word: str) -> int:
    """The first token of the reply ``word``."""
    tokens = tokenization.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"the tokenizer has no token for {word!r}; give the judge another word")
    return int(tokens[0])
