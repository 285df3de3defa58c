"""Builds the run of a recipe that learns from rewards.

The user's mistakes are found before the run folder is made, by the cheapest checks first: recipe, model
folder, data, rewards, folder (``build/inputs.py``). Only then are weights loaded. This module builds the
learner, ``build/rollout.py`` the parts that sample and grade, ``build/outputs.py`` the parts that write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rltrain.advantage import ADVANTAGES
from rltrain.build.context import RunContext
from rltrain.build.inputs import RunInputs
from rltrain.build.outputs import PROCESS, TrainingState, build_model_writer, build_reporter, initial_model
from rltrain.build.rollout import build_rollout
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_state import read_state, restoring
from rltrain.config.rules.registries import ORDERS
from rltrain.config.schema import Loss, MethodRef, Model, OnlineRecipe, TermRef
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.control.coefficient import Controller
from rltrain.control.stage import current_policy_needs, split_by_timing
from rltrain.learner.head import STATISTICS
from rltrain.learner.policy_learner import FROZEN, PolicyLearner
from rltrain.learner.process_reward import POLICY, ProcessRewardLearner
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.terms.distill import MASS
from rltrain.process import ALONE, Process
from rltrain.registry import BoundMethod
from rltrain.report.law import Law
from rltrain.rollout.steps import StepSplitter
from rltrain.seeds import stable_hash
from rltrain.train.online import OnlineRun


def build_online_run(recipe: OnlineRecipe, inputs: RunInputs, context: RunContext) -> OnlineRun:
    """Loads weights and starts the engine."""
    seed_everything(recipe.seed)
    process = context.process
    learner = build_learner(recipe, context.checkpoint, process)
    inputs.grader.log_to(context.folder.rewards_log(process.rank))
    rollout = build_rollout(recipe, inputs, learner, process, fresh=context.is_fresh)
    advantage = ADVANTAGES.bind(recipe.advantage.name, recipe.advantage.hp)
    controls = [TOKEN_CONTROLS.bind(ref.name, ref.hp) for ref in recipe.control]
    step_controls, update_controls = split_by_timing(controls)
    controllers = build_controllers(recipe.loss, recipe.train.steps)
    law = Law()
    objective = build_objective(recipe.loss, controllers)

    before = _needed_before_updates(recipe, advantage, controls)
    load_frozen_models(recipe.model, learner, before | objective.needs)
    process_reward = build_process_reward(recipe, context.checkpoint, process)

    state = TrainingState(
        learner, rollout.source, rollout.sync, tuple(controllers.values()), law, process_reward
    )
    resumed = None if context.checkpoint is None else read_state(context.checkpoint)
    if resumed is not None and context.checkpoint is not None:
        with restoring(context.checkpoint):
            state.load_state_dict(resumed)
    needs = before | ORDERS.spec(recipe.data.order.name).needs
    return OnlineRun(
        recipe=recipe,
        total_steps=recipe.train.steps,
        learner=learner,
        source=rollout.source,
        sync=rollout.sync,
        evaluator=rollout.evaluator,
        process_reward=process_reward,
        advantage=advantage,
        step_controls=step_controls,
        update_controls=update_controls,
        objective=objective,
        controllers=tuple(
            (objective.terms[place].name, controller) for place, controller in controllers.items()
        ),
        passes=needed_passes(recipe, needs, objective.needs),
        step_splitter=StepSplitter(inputs.tokenization.decode) if "step_id" in before else None,
        mismatch=rollout.mismatch,
        law=law,
        reporter=build_reporter(
            recipe,
            context,
            recipe.train.steps,
            resumed,
            recipe.report.transcripts,
            inputs.tokenization.decode,
        ),
        writer=build_model_writer(
            recipe, inputs.tokenization, learner, state.state_dict, context, process_reward
        ),
        resumed=resumed,
        should_stop=context.should_stop,
    )


def _needed_before_updates(
    recipe: OnlineRecipe, advantage: BoundMethod, controls: Sequence[BoundMethod]
) -> frozenset[str]:
    """The statistics that advantage, controls and the process reward model need before the first update."""
    needs = advantage.needs.union(*(control.needs for control in controls))
    settings = recipe.process_reward
    return needs | {"old_logp"} if settings is not None and settings.reference == POLICY else needs


def load_frozen_models(model: Model, learner: PolicyLearner, needs: frozenset[str]) -> None:
    """Loads reference and teacher if their log-probs are needed."""
    for statistic, path in (("ref_logp", model.reference), ("teacher_logp", model.teacher)):
        if statistic in needs:
            learner.use_frozen(statistic, path, model)


def needed_passes(recipe: OnlineRecipe, before: frozenset[str], losses: frozenset[str]) -> frozenset[str]:
    """The no-grad passes of a step: exactly the statistics that the gradient pass cannot provide.

    before: statistics that advantage and controls need. losses: those that policy loss and terms need. The
    ratio is taken against the gradient pass's own log-probs if a rollout has one update, and against the
    engine's with ``rollout.trust_logp``: neither case needs a pass.
    """
    passes: set[str] = set()
    several_updates = recipe.learner.updates * recipe.learner.epochs > 1
    if not recipe.rollout.trust_logp and ("old_logp" in before or ("old_logp" in losses and several_updates)):
        passes |= {"logp", "entropy"}  # the entropy costs almost nothing once the logits are computed
    if "old_entropy" in before | losses:
        passes |= {"logp", "entropy"} if not recipe.rollout.trust_logp else {"entropy"}
    passes |= {
        name
        for name in before
        if name.partition(":")[0] in STATISTICS and name not in current_policy_needs(before)
    }
    passes |= {name for name in before | losses if name == "alignment" or name.startswith(MASS)}
    return frozenset(passes | (FROZEN & (before | losses)))


def build_learner(
    recipe: OnlineRecipe, checkpoint: Path | None = None, process: Process = ALONE
) -> PolicyLearner:
    """The learner with the recipe's weights, or those of ``checkpoint``."""
    settings = recipe.learner
    return PolicyLearner(
        initial_model(recipe.model, checkpoint),
        settings,
        temperature=recipe.rollout.temperature,
        max_tokens=recipe.rollout.max_tokens,
        total_updates=recipe.train.steps * settings.updates * settings.epochs,
        seed=recipe.seed,
        deadline=process.deadline,
    )


def build_process_reward(
    recipe: OnlineRecipe, checkpoint: Path | None = None, process: Process = ALONE
) -> ProcessRewardLearner | None:
    """The model that learns process rewards, with the recipe's weights or those of ``checkpoint``; None
    if the recipe has no such model.
    """
    settings = recipe.process_reward
    if settings is None:
        return None
    revision = recipe.model.revision if settings.path is None else None
    changes = {
        "path": settings.path or recipe.model.path,
        "revision": revision,
        "reference": None,
        "teacher": None,
    }
    origin = recipe.model.model_copy(update=changes)
    return ProcessRewardLearner(
        initial_model(origin, None if checkpoint is None else checkpoint / PROCESS),
        origin,
        settings,
        recipe.learner,
        PREFERENCE_LOSSES.bind(settings.loss.name, settings.loss.hp),
        total_updates=recipe.train.steps * settings.updates,
        seed=stable_hash(recipe.seed, "process reward"),
        deadline=process.deadline,
    )


def build_objective(loss: Loss, controllers: Mapping[int, Controller]) -> Objective:
    """controllers: from ``build_controllers``, for the terms whose coefficient is not a number."""
    return Objective(
        policy_loss=POLICY_LOSSES.bind(loss.policy.name, loss.policy.hp),
        terms=tuple(build_term(term, controllers.get(place)) for place, term in enumerate(loss.terms)),
        aggregate=AGGREGATES.bind(loss.aggregate.name, loss.aggregate.hp),
    )


def build_controllers(loss: Loss, steps: int) -> dict[int, Controller]:
    """By the position of their term in ``loss.terms``; a term whose coefficient is a number has none."""
    controllers: dict[int, Controller] = {}
    for place, term in enumerate(loss.terms):
        ref = term.coefficient
        if isinstance(ref, MethodRef):
            coefficient = COEFFICIENTS.bind(ref.name, ref.hp)
            controllers[place] = coefficient(**dict.fromkeys(coefficient.spec.inputs, steps))
    return controllers


def build_term(ref: TermRef, controller: Controller | None) -> Term:
    bound = LOSS_TERMS.bind(ref.name, ref.hp)
    if controller is not None:
        return Term(bound.name, bound, controller, controller.inputs)
    assert isinstance(ref.coefficient, float)
    return Term(bound.name, bound, ref.coefficient)
