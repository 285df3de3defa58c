"""Builds the run of a recipe that learns from rewards.

The user's mistakes are found before the run folder is made, by the cheapest checks first: recipe, model
folder, data, rewards, folder (``build/inputs.py``). Only then are weights loaded. This module builds the
learner, ``build/rollout.py`` the parts that sample and grade, ``build/outputs.py`` the parts that write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain.advantage import ADVANTAGES
from rltrain.build.context import RunContext
from rltrain.build.engine_share import rollout_beside
from rltrain.build.inputs import RunInputs
from rltrain.build.outputs import PROCESS, TrainingState, build_outputs, initial_model, resume, saved_adapter
from rltrain.build.recomputation import recompute_what_must_be
from rltrain.build.rollout import build_rollout
from rltrain.build.schedule import add_lag
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_state import is_sharded
from rltrain.config.rules.registries import ORDERS
from rltrain.config.schema import (
    Learner,
    Loss,
    MethodRef,
    Model,
    OnlineRecipe,
    ProcessReward,
    Rollout,
    TermRef,
)
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.control.coefficient import Controller
from rltrain.control.stage import PerUpdateControls, current_policy_needs, split_by_timing
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
from rltrain.rollout.source import PromptedSource
from rltrain.rollout.steps import StepSplitter
from rltrain.seeds import stable_hash
from rltrain.train.lagged import LaggedRollouts
from rltrain.train.online import OnlineRun


@dataclass(frozen=True)
class Methods:
    """The recipe's methods, bound to their hyperparameters.

    controllers: of the coefficients that change, by the position of their term in ``loss.terms``. before: the
    statistics that are needed before the first update.
    """

    advantage: BoundMethod
    step_controls: tuple[BoundMethod, ...]
    update_controls: PerUpdateControls | None
    objective: Objective
    controllers: Mapping[int, Controller]
    before: frozenset[str]

    @property
    def all_controllers(self) -> tuple[Controller, ...]:
        return tuple(self.controllers.values())

    @property
    def named_controllers(self) -> tuple[tuple[str, Controller], ...]:
        terms = self.objective.terms
        return tuple((terms[place].name, controller) for place, controller in self.controllers.items())


def build_online_run(recipe: OnlineRecipe, inputs: RunInputs, context: RunContext) -> OnlineRun:
    """Loads weights and starts the engine."""
    seed_everything(recipe.seed)
    steps = recipe.train.steps
    learner = build_learner(
        recipe.model, recipe.learner, recipe.rollout, steps, recipe.seed, context.checkpoint, context.process
    )
    rollout = build_rollout(inputs, learner, context, recipe, rollout_beside(recipe, learner.trained))
    methods = bind_methods(recipe.advantage, recipe.control, recipe.loss, recipe.process_reward, steps)
    load_frozen_models(recipe.model, learner, methods.before | methods.objective.needs)
    process_reward = build_process_reward(
        recipe.process_reward, recipe.model, recipe.learner, steps, recipe.seed, context
    )

    others = [] if process_reward is None else [process_reward.trained]
    recompute_what_must_be(recipe, [learner.trained, *others])
    law = Law()
    source = add_lag(rollout.source, recipe, context.process)
    state = TrainingState(learner, source, rollout.sync, methods.all_controllers, law, process_reward)
    resumed = resume(context.checkpoint, state)
    decode = inputs.tokenization.decode
    reporter, writer = build_outputs(
        recipe, context, steps, resumed, inputs.tokenization, learner, state.state_dict, process_reward
    )
    needs = methods.before | ORDERS.spec(recipe.data.order.name).needs
    return OnlineRun(
        recipe=recipe,
        total_steps=steps,
        learner=learner,
        source=source,
        sync=rollout.sync,
        keeps_weights=keeps_weights(source, recipe.rollout),
        evaluator=rollout.evaluator,
        process_reward=process_reward,
        advantage=methods.advantage,
        step_controls=methods.step_controls,
        update_controls=methods.update_controls,
        objective=methods.objective,
        controllers=methods.named_controllers,
        passes=needed_passes(recipe.learner, recipe.rollout, needs, methods.objective.needs),
        step_splitter=StepSplitter(decode) if "step_id" in methods.before else None,
        mismatch=rollout.mismatch,
        law=law,
        reporter=reporter,
        writer=writer,
        resumed=resumed,
        should_stop=context.should_stop,
    )


def keeps_weights(source: PromptedSource, rollout: Rollout) -> bool:
    """Whether workers may need the pushed weights again while the learner changes its own."""
    return rollout.bound is not None or (isinstance(source, LaggedRollouts) and source.overlaps)


def bind_methods(
    advantage: MethodRef,
    control: Sequence[MethodRef],
    loss: Loss,
    process_reward: ProcessReward | None,
    steps: int,
) -> Methods:
    estimator = ADVANTAGES.bind(advantage.name, advantage.hp)
    controls = [TOKEN_CONTROLS.bind(ref.name, ref.hp) for ref in control]
    step_controls, update_controls = split_by_timing(controls)
    controllers = build_controllers(loss, steps)
    return Methods(
        estimator,
        step_controls,
        update_controls,
        build_objective(loss, controllers),
        controllers,
        _needed_before_updates(process_reward, estimator, controls),
    )


def _needed_before_updates(
    process_reward: ProcessReward | None, advantage: BoundMethod, controls: Sequence[BoundMethod]
) -> frozenset[str]:
    """The statistics that advantage, controls and the process reward model need before the first update."""
    needs = advantage.needs.union(*(control.needs for control in controls))
    reads_policy = process_reward is not None and process_reward.reference == POLICY
    return needs | {"old_logp"} if reads_policy else needs


def load_frozen_models(model: Model, learner: PolicyLearner, needs: frozenset[str]) -> None:
    """Loads reference and teacher if their log-probs are needed."""
    for statistic, path in (("ref_logp", model.reference), ("teacher_logp", model.teacher)):
        if statistic in needs:
            learner.use_frozen(statistic, path, model)


def needed_passes(
    learner: Learner, rollout: Rollout, before: frozenset[str], losses: frozenset[str]
) -> frozenset[str]:
    """The no-grad passes of a step: exactly the statistics that the gradient pass cannot provide.

    before: statistics that advantage and controls need. losses: those that policy loss and terms need. The
    ratio is taken against the gradient pass's own log-probs if a rollout has one update, and against the
    engine's with ``rollout.trust_logp``: neither case needs a pass.
    """
    passes: set[str] = set()
    several_updates = learner.updates * learner.epochs > 1
    if not rollout.trust_logp and ("old_logp" in before or ("old_logp" in losses and several_updates)):
        passes |= {"logp", "entropy"}  # the entropy costs almost nothing once the logits are computed
    if "old_entropy" in before | losses:
        passes |= {"logp", "entropy"} if not rollout.trust_logp else {"entropy"}
    passes |= {
        name
        for name in before
        if name.partition(":")[0] in STATISTICS and name not in current_policy_needs(before)
    }
    passes |= {name for name in before | losses if name == "alignment" or name.startswith(MASS)}
    return frozenset(passes | (FROZEN & (before | losses)))


def build_learner(
    model: Model,
    settings: Learner,
    rollout: Rollout,
    steps: int,
    seed: int,
    checkpoint: Path | None = None,
    process: Process = ALONE,
) -> PolicyLearner:
    """The learner with the weights of ``model``, or those of ``checkpoint``."""
    return PolicyLearner(
        initial_model(model, checkpoint),
        settings,
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        total_updates=steps * settings.updates * settings.epochs,
        seed=seed,
        adapter_from=saved_adapter(model, checkpoint),
        deadline=process.deadline,
    )


def build_process_reward(
    settings: ProcessReward | None,
    policy: Model,
    learner: Learner,
    steps: int,
    seed: int,
    context: RunContext,
) -> ProcessRewardLearner | None:
    """The model that learns process rewards, with its starting weights or those of the checkpoint; None
    without ``settings``.
    """
    if settings is None:
        return None
    checkpoint = context.checkpoint
    if checkpoint is not None and not is_sharded(checkpoint):
        checkpoint /= PROCESS
    revision = policy.revision if settings.path is None else None
    changes = {
        "path": settings.path or policy.path,
        "revision": revision,
        "reference": None,
        "teacher": None,
    }
    origin = policy.model_copy(update=changes)
    return ProcessRewardLearner(
        initial_model(origin, checkpoint),
        origin,
        settings,
        learner,
        PREFERENCE_LOSSES.bind(settings.loss.name, settings.loss.hp),
        total_updates=steps * settings.updates,
        seed=stable_hash(seed, "process reward"),
        adapter_from=saved_adapter(origin, checkpoint),
        deadline=context.process.deadline,
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
