"""What a recipe that learns from pairs of the policy's own completions is made of. Its sampling half is ``build_rollout.py``'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from rltrain.build_materials import Materials
from rltrain.build_rollout import build_rollout
from rltrain.build_state import Carried, build_reporter, model_writer, start_of
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import read_state
from rltrain.config.check_pairs import JUDGES, sampling_recipe
from rltrain.config.schema import PairRecipe
from rltrain.data.chat import render
from rltrain.data.language import Language, sizes_of
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.frozen import require_companion
from rltrain.learner.pair_learner import PairLearner
from rltrain.learner.reward_model import RewardModel
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.model_limits import context_of
from rltrain.rollout.judges import JudgeMeans
from rltrain.rollout.pairing import Pairing
from rltrain.train.online_pairs import PairRun
from rltrain.types import TokenRows
from rltrain.watchdog import Waiting, unwatched

__all__ = ["build_pair_run", "build_pairing"]


def build_pair_run(
    recipe: PairRecipe,
    materials: Materials,
    folder: RunFolder,
    main: bool,
    checkpoint: Path | None,
    stop: Callable[[], bool],
    waiting: Waiting = unwatched,
    inputs: Mapping[str, str] | None = None,
) -> PairRun:
    """Weights are loaded here. Arguments as of ``build.build_run``."""
    seed_everything(recipe.seed)
    sampling, ref = sampling_recipe(recipe), recipe.loss.preference
    objective = PreferenceObjective(PREFERENCE_LOSSES.bind(ref.name, ref.hp))
    learner = build_pair_learner(recipe, objective, checkpoint, waiting)
    materials.grader.log_to(folder.rewards_log(learner.rank))
    rollout = build_rollout(sampling, materials, learner, waiting, fresh=checkpoint is None)
    pairing = build_pairing(recipe, materials.language, learner)
    resumed = None if checkpoint is None else read_state(checkpoint)
    carried = Carried(learner, rollout.producer, rollout.sync)
    if resumed is not None:
        carried.restore(resumed)
    return PairRun(
        recipe=recipe,
        learner=learner,
        engine=rollout.engine,
        sync=rollout.sync,
        producer=rollout.producer,
        evaluator=rollout.evaluator,
        pairing=pairing,
        objective=objective,
        mismatch=rollout.mismatch,
        reporter=build_reporter(recipe, folder, recipe.train.steps, resumed, main),
        writer=model_writer(recipe, materials.language, learner, carried.place, folder, main, inputs=inputs),
        resumed=resumed,
        stop=stop,
    )


def build_pair_learner(
    recipe: PairRecipe, objective: PreferenceObjective, checkpoint: Path | None, waiting: Waiting = unwatched
) -> PairLearner:
    """With the recipe's weights, or those of ``checkpoint``, and beside it the frozen models that loss and judge need."""
    settings, model = recipe.learner, recipe.model
    learner = PairLearner(
        start_of(model, checkpoint),
        settings,
        temperature=recipe.rollout.temperature,
        max_tokens=recipe.rollout.max_tokens,
        total_updates=recipe.train.steps * settings.updates * settings.epochs,
        seed=recipe.seed,
        waiting=waiting,
    )
    judge = recipe.pairs.judge
    if "ref_logp" in objective.needs or (judge.name == "self" and judge.hp.get("by") == "reference"):
        learner.use_frozen("ref_logp", model.reference, model)
    if recipe.train.previous_every > 1:
        learner.keep_iterate(model)
    return learner


def build_pairing(recipe: PairRecipe, language: Language, learner: PairLearner) -> Pairing:
    """The judge, and how pairs are made of what it says. Raises UserError where the judge cannot be had."""
    settings, most = recipe.pairs, recipe.learner.tokens_per_micro_batch
    context = context_of(learner.model.config)

    def log_probs(rows: TokenRows, by: Literal["policy", "reference"]) -> Tensor:
        return learner.log_probs(rows, sides=2, policy=learner.frozen["ref_logp"] if by == "reference" else None)

    def rendered(text: str) -> list[int]:
        data = recipe.data
        return render(text, language.tokenizer, system=None, chat_template=data.chat_template, date=data.date)[1]

    means = JudgeMeans(
        log_probs=log_probs,
        render=rendered,
        decode=language.decode,
        word=partial(first_token, language),
        reward_model=partial(RewardModel, device=learner.device, tokens_per_micro_batch=most, date=recipe.data.date),
        rank=learner.rank,
        ranks=learner.ranks,
        gather=learner.gather_objects,
        most_tokens=most // 2 if context is None else min(context.tokens, most // 2),
    )
    with user_mistakes():
        path, column = settings.judge.hp.get("path"), settings.judge.hp.get("prompt_column")
        if settings.judge.name == "reward_model" and path and column is None:
            sizes = sizes_of(sampling_recipe(recipe))
            require_companion(language.tokenizer, recipe.model.path, "pairs.judge.path", path, head="scalar", sizes=sizes)
        judge = JUDGES.bind(settings.judge.name, settings.judge.hp)(means)
    return Pairing(judge, settings.choose, settings.verdict, settings.tolerance, recipe.seed)


def first_token(language: Language, word: str) -> int:
    """The token that a reply of ``word`` begins with."""
    tokens = language.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"the tokenizer has no token for {word!r}; give the judge another word")
    return int(tokens[0])
