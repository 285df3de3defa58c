"""The online loop: sample, grade, annotate, weigh, update, sync, report. One page, blind to which method runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rltrain.advantage.stage import assign
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.config.schema import Recipe
from rltrain.learner.accelerate_learner import AccelerateLearner, UpdateStats
from rltrain.loss.objective import Objective
from rltrain.protocols import RolloutEngine
from rltrain.registry import BoundMethod
from rltrain.report.metrics import completion_metrics, step_metrics, why_zero
from rltrain.report.reporter import Reporter
from rltrain.rollout.collate import collate
from rltrain.rollout.producer import Produced, Producer
from rltrain.train.evaluate import Evaluation, Evaluator
from rltrain.types import TokenRows, TrainBatch


@dataclass(frozen=True)
class ModelWriter:
    """Puts models where a run keeps them; ``write(out, step, results)`` makes one."""

    folder: RunFolder
    write: Callable[[Path, int, Mapping[str, float]], Path]
    keep: int  # checkpoints, the latest
    main: bool  # rank 0, the one that writes and removes

    def checkpoint(self, step: int, results: Mapping[str, float]) -> None:
        """``checkpoints/step-N``, a model folder like the last one; what is older than the latest ``keep`` goes once it is there."""
        self.write(self.folder.checkpoint(step), step, results)
        if self.main:
            self.folder.prune_checkpoints(self.keep)

    def final(self, step: int, results: Mapping[str, float]) -> Path:
        return self.write(self.folder.model, step, results)


@dataclass(frozen=True)
class Run:
    """Everything one online run is made of; ``build.py`` puts it together."""

    recipe: Recipe
    learner: AccelerateLearner
    engine: RolloutEngine
    producer: Producer
    evaluator: Evaluator | None
    advantage: BoundMethod
    step_controls: tuple[BoundMethod, ...]  # statistics over the whole step
    update_controls: tuple[BoundMethod, ...]  # statistics over one optimizer batch, with the policy as it is then
    objective: Objective
    annotate: frozenset[str]  # no-grad passes the recipe needs: "logp", "entropy", "ref_logp"
    reporter: Reporter
    writer: ModelWriter


def train(run: Run) -> Path:
    """Run every step of the recipe; returns the folder of the finished model. Raises NonFiniteError when the numbers are lost."""
    learner, settings = run.learner, run.recipe
    run.engine.load(learner.weights(), learner.version)
    scores = Scores()
    if settings.eval.at_start:
        scores.add(evaluate(run, 0))
    for step in range(1, settings.train.steps + 1):
        clock = Clock()
        produced = run.producer.next(step, learner.version)
        run.engine.sleep()  # on GPU the learner takes the memory
        with clock("annotate"):
            rows, sampled = collate(produced.groups)
            batch = weigh(run, annotated(run, rows, sampled))
        lr = learner.lr
        with clock("update"):
            update = learner.update(rows, batch, run.objective, adjust(run))
        with clock("sync"):
            run.engine.wake()
            run.engine.load(learner.weights(), learner.version)
        report(run, step, produced, sampled, batch, update, lr, produced.seconds | clock.seconds)
        if due(step, settings.eval.every) and step < settings.train.steps:
            scores.add(evaluate(run, step))
        if due(step, settings.checkpoint.every):
            run.writer.checkpoint(step, scores.metrics())
    scores.add(evaluate(run, settings.train.steps))
    return run.writer.final(settings.train.steps, scores.metrics())


def due(step: int, every: int) -> bool:
    """``every`` 0: never."""
    return every > 0 and step % every == 0


def annotated(run: Run, rows: TokenRows, batch: TrainBatch) -> TrainBatch:
    """The batch with what the recipe's functions need of the learner, and nothing more."""
    if run.recipe.rollout.trust_logp:
        batch = batch.replace(old_logp=batch.rollout_logp)
    notes = run.learner.annotate(rows, run.annotate) if run.annotate else {}
    names = {"logp": "old_logp", "entropy": "old_entropy", "ref_logp": "ref_logp"}
    return batch.replace(**{names[name]: value for name, value in notes.items()})


def weigh(run: Run, batch: TrainBatch) -> TrainBatch:
    """Advantages, then the controls in the recipe's order, over the whole step."""
    batch = assign(batch, run.advantage)
    for control in run.step_controls:
        batch = control(batch)
    return batch


def adjust(run: Run) -> Callable[[TrainBatch], TrainBatch] | None:
    """The controls that look at the current policy, as one function of an optimizer batch; None if the recipe has none."""
    if not run.update_controls:
        return None

    def apply(batch: TrainBatch) -> TrainBatch:
        for control in run.update_controls:
            batch = control(batch)
        return batch

    return apply


def report(
    run: Run,
    step: int,
    produced: Produced,
    sampled: TrainBatch,
    batch: TrainBatch,
    update: UpdateStats,
    lr: float,
    seconds: dict[str, float],
) -> None:
    """One step's numbers to every sink, one line to the terminal. sampled: the batch before any control touched it."""
    logp = update.logp if batch.old_logp is None or run.recipe.rollout.trust_logp else batch.old_logp
    entropy = update.entropy if batch.old_entropy is None else batch.old_entropy
    total = sum(seconds.values())
    completions = completion_metrics(produced.groups)
    metrics = {
        **completions,
        **step_metrics(batch, logp, entropy, sampled.mask),
        **update.metrics,
        "learner/lr": lr,
        "learner/version": run.learner.version,
        "learner/idle_rows": update.idle_rows,
        "learner/trained_rows": update.trained_rows,
        "learner/trained_tokens": update.trained_tokens,
        "learner/skipped_updates": update.skipped_updates,
        "rollout/generated_groups": produced.generated_groups,
        "rollout/rounds": produced.rounds,
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/step": total,
        "time/tokens_per_second": completions["rollout/tokens"] / total,
    }
    note = why_zero(batch, lr) if update.metrics["learner/grad_norm"] == 0 or lr == 0 else None
    run.reporter.step(step, metrics, produced.groups, note)


def evaluate(run: Run, step: int) -> Evaluation | None:
    """Held-out pass@k with the weights as they are; None if the recipe has no held-out prompts."""
    if run.evaluator is None:
        return None
    started = perf_counter()
    result = run.evaluator.evaluate(run.engine, run.learner.version)
    run.reporter.evaluation(step, {**result.metrics(), "time/eval": perf_counter() - started})
    return result


@dataclass
class Scores:
    """The evaluations of a run, first to last."""

    all: list[Evaluation] = field(default_factory=list)

    def add(self, result: Evaluation | None) -> None:
        if result is not None:
            self.all.append(result)

    def metrics(self) -> dict[str, float]:
        """First and last, for the model card."""
        if not self.all:
            return {}
        first = {f"{name} (before)": value for name, value in self.all[0].metrics().items()}
        return first | self.all[-1].metrics()


class Clock:
    """Wall-clock seconds per phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started
