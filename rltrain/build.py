"""Recipe names to objects: ``build*.py`` are the only files that know concrete classes.

What a user can get wrong is looked at first, cheapest first, and before the run folder is made: recipe, model folder, data, rewards,
folder (``build_materials.py``). Only then are weights loaded, here: the learner and what it learns by, with what samples and grades
(``build_rollout.py``) and what is written (``build_state.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rltrain.advantage import ADVANTAGES
from rltrain.build_materials import Materials
from rltrain.build_rollout import build_rollout
from rltrain.build_state import PROCESS, Carried, build_reporter, model_writer, start_of
from rltrain.checkpoint.random_state import seed_everything
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import read_state
from rltrain.config.check import ORDERS
from rltrain.config.schema import MethodRef, ProcessReward, Recipe, TermRef
from rltrain.control import COEFFICIENTS, TOKEN_CONTROLS
from rltrain.control.coefficient import Controller
from rltrain.control.stage import current, split
from rltrain.learner.accelerate_learner import FROZEN, AccelerateLearner
from rltrain.learner.head import STATISTICS
from rltrain.learner.process_reward import POLICY, ProcessRewardLearner
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.terms_distill import MASS
from rltrain.report.law import Law
from rltrain.rollout.steps import Lines
from rltrain.seeds import stable_hash
from rltrain.train.online import Run
from rltrain.watchdog import Waiting, unwatched


def build_run(
    recipe: Recipe,
    materials: Materials,
    folder: RunFolder,
    main: bool,
    checkpoint: Path | None,
    stop: Callable[[], bool],
    waiting: Waiting = unwatched,
    inputs: Mapping[str, str] | None = None,
) -> Run:
    """Weights are loaded here. main: this is rank 0, the one that writes. checkpoint: where the run goes on; None: at its start.

    waiting: gives every wait its deadline.
    """
    seed_everything(recipe.seed)
    learner = build_learner(recipe, checkpoint, waiting)
    materials.grader.log_to(folder.rewards_log(learner.rank))
    rollout = build_rollout(recipe, materials, learner, waiting, fresh=checkpoint is None)
    advantage = ADVANTAGES.bind(recipe.advantage.name, recipe.advantage.hp)
    controls = [TOKEN_CONTROLS.bind(ref.name, ref.hp) for ref in recipe.control]
    step_controls, adjust = split(controls)
    controllers, law = build_controllers(recipe), Law()
    objective = build_objective(recipe, controllers)
    before = advantage.needs.union(*(control.needs for control in controls))  # needed before the first update
    if recipe.process_reward is not None and recipe.process_reward.reference == POLICY:
        before |= {"old_logp"}
    for statistic, path in (("ref_logp", recipe.model.reference), ("teacher_logp", recipe.model.teacher)):
        if statistic in before | objective.needs:
            learner.use_frozen(statistic, path, recipe.model)
    resumed = None if checkpoint is None else read_state(checkpoint)
    process = None if recipe.process_reward is None else build_process_reward(recipe, recipe.process_reward, checkpoint, waiting)
    carried = Carried(learner, rollout.producer, rollout.sync, tuple(controllers.values()), law, process)
    if resumed is not None:
        carried.restore(resumed)
    return Run(
        recipe=recipe,
        learner=learner,
        engine=rollout.engine,
        sync=rollout.sync,
        producer=rollout.producer,
        evaluator=rollout.evaluator,
        process_reward=process,
        advantage=advantage,
        step_controls=step_controls,
        adjust=adjust,
        objective=objective,
        controllers=tuple((objective.terms[place].name, controller) for place, controller in controllers.items()),
        annotate=needed_passes(recipe, before | ORDERS.spec(recipe.data.order.name).needs, objective.needs),
        lines=Lines(materials.language.decode) if "step_id" in before else None,
        mismatch=rollout.mismatch,
        law=law,
        reporter=build_reporter(recipe, folder, recipe.train.steps, resumed, main),
        writer=model_writer(recipe, materials.language, learner, carried.place, folder, main, process, inputs=inputs),
        resumed=resumed,
        stop=stop,
    )


def needed_passes(recipe: Recipe, before: frozenset[str], losses: frozenset[str]) -> frozenset[str]:
    """The no-grad passes of a step: exactly what is needed and cannot be had from the gradient pass.

    before: needed by advantage and controls. losses: by policy loss and terms. With one update per rollout a ratio is taken
    against the gradient pass's own log-probs, and with ``rollout.trust_logp`` against the engine's: no pass in either case.
    """
    wants: set[str] = set()
    several = recipe.learner.updates * recipe.learner.epochs > 1
    if not recipe.rollout.trust_logp and ("old_logp" in before or ("old_logp" in losses and several)):
        wants |= {"logp", "entropy"}  # the entropy costs next to nothing once the logits are there
    if "old_entropy" in before | losses:
        wants |= {"logp", "entropy"} if not recipe.rollout.trust_logp else {"entropy"}
    wants |= {name for name in before if name.partition(":")[0] in STATISTICS and name not in current(before)}
    wants |= {name for name in before | losses if name == "alignment" or name.startswith(MASS)}
    return frozenset(wants | (FROZEN & (before | losses)))


def build_learner(recipe: Recipe, checkpoint: Path | None = None, waiting: Waiting = unwatched) -> AccelerateLearner:
    """With the recipe's weights, or those of ``checkpoint``."""
    settings = recipe.learner
    return AccelerateLearner(
        start_of(recipe.model, checkpoint),
        settings,
        temperature=recipe.rollout.temperature,
        max_tokens=recipe.rollout.max_tokens,
        total_updates=recipe.train.steps * settings.updates * settings.epochs,
        seed=recipe.seed,
        waiting=waiting,
    )


def build_process_reward(
    recipe: Recipe, settings: ProcessReward, checkpoint: Path | None = None, waiting: Waiting = unwatched
) -> ProcessRewardLearner:
    """The model that learns process rewards, with the recipe's weights or those of ``checkpoint``."""
    revision = recipe.model.revision if settings.path is None else None
    changes = {"path": settings.path or recipe.model.path, "revision": revision, "reference": None, "teacher": None}
    origin = recipe.model.model_copy(update=changes)
    return ProcessRewardLearner(
        start_of(origin, None if checkpoint is None else checkpoint / PROCESS),
        origin,
        settings,
        recipe.learner,
        PREFERENCE_LOSSES.bind(settings.loss.name, settings.loss.hp),
        max_tokens=recipe.rollout.max_tokens,
        total_updates=recipe.train.steps * settings.updates,
        seed=stable_hash(recipe.seed, "process reward"),
        waiting=waiting,
    )


def build_objective(recipe: Recipe, controllers: Mapping[int, Controller] | None = None) -> Objective:
    """controllers: of the terms whose coefficient is none of a number, ``build_controllers``; None: made here, known to nobody else."""
    loss, controllers = recipe.loss, build_controllers(recipe) if controllers is None else controllers
    return Objective(
        policy_loss=POLICY_LOSSES.bind(loss.policy.name, loss.policy.hp),
        terms=tuple(build_term(term, controllers.get(place)) for place, term in enumerate(loss.terms)),
        aggregate=AGGREGATES.bind(loss.aggregate.name, loss.aggregate.hp),
    )


def build_controllers(recipe: Recipe) -> dict[int, Controller]:
    """By the place of their term in ``loss.terms``; a term whose coefficient is a number has none."""
    refs = [(place, term.coefficient) for place, term in enumerate(recipe.loss.terms)]
    made = {place: COEFFICIENTS.bind(ref.name, ref.hp) for place, ref in refs if isinstance(ref, MethodRef)}
    return {place: one(**dict.fromkeys(one.spec.inputs, recipe.train.steps)) for place, one in made.items()}


def build_term(ref: TermRef, controller: Controller | None) -> Term:
    bound = LOSS_TERMS.bind(ref.name, ref.hp)
    if controller is not None:
        return Term(ref.name, bound, controller, controller.inputs)
    assert isinstance(ref.coefficient, float)
    return Term(ref.name, bound, ref.coefficient)
