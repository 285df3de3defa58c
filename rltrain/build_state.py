"""What a run writes as it goes, and how it goes on from there: reports, models, checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rltrain.checkpoint.export import export_model
from rltrain.checkpoint.model_card import model_card
from rltrain.checkpoint.random_state import random_state
from rltrain.checkpoint.run_folder import RunFolder, describe_environment
from rltrain.checkpoint.run_state import RunState, write_state
from rltrain.config.schema import AnyRecipe, Model, OfflineRecipe
from rltrain.control.coefficient import Controller
from rltrain.data.language import Language
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.accelerate_learner import AccelerateLearner
from rltrain.learner.process_reward import ProcessRewardLearner
from rltrain.remote_code import trust_copy
from rltrain.report.law import Law
from rltrain.report.progress import Progress
from rltrain.report.reporter import Reporter
from rltrain.report.sinks import open_sinks
from rltrain.report.transcripts import Transcripts
from rltrain.rollout.producer import Producer
from rltrain.sync.in_process import Sync
from rltrain.train.saving import ModelWriter

PROCESS = "process_reward"  # folder of the process reward model below the policy's, and the mark of its optimizer's tensors
QUIET = Reporter(None, None, None)  # says nothing
_Model = TypeVar("_Model", bound=Model)


def build_reporter(recipe: AnyRecipe, folder: RunFolder, steps: int, resumed: RunState | None, main: bool) -> Reporter:
    """Of a run of ``steps`` steps. Only rank 0, ``main``, says anything; transcripts are of completions that were sampled."""
    if not main:
        return QUIET
    progress = Progress(steps, start=0 if resumed is None else resumed.step)
    sinks = open_sinks(folder.path, recipe.report.sinks, recipe.report.project, recipe.model_dump(mode="json"), progress.warn)
    sampled = not isinstance(recipe, OfflineRecipe)
    return Reporter(sinks, Transcripts(folder.transcripts, recipe.report.transcripts) if sampled else None, progress)


def model_writer(
    recipe: AnyRecipe,
    language: Language,
    learner: AccelerateLearner,
    place: Callable[[], Mapping[str, Any]],
    folder: RunFolder,
    main: bool,
    process: ProcessRewardLearner | None = None,
    inputs: Mapping[str, str] | None = None,
) -> ModelWriter:
    """Every rank takes part in gathering weights and states; rank 0 writes. place: the fields of RunState that say where the data stand.

    process: a model folder of its own below the policy's, and the rest of its state with the policy's.
    inputs: digests of what the run reads beside its recipe.
    """

    def write(out: Path, step: int, results: Mapping[str, float], state: RunState | None) -> Path:
        weights, second = learner.state_dict(), None if process is None else process.state_dict()
        card = model_card(recipe.model_dump(mode="json"), results, step)

        def extra(making: Path) -> None:
            if process is not None:
                export_model(making / PROCESS, process.model, language.tokenizer, card, second)
            if state is not None:
                write_state(making, state)

        if main:
            export_model(out, learner.model, language.tokenizer, card, weights, extra)
        return out

    def snapshot(step: int, evaluations: Sequence[Mapping[str, float]]) -> RunState:
        tensors, values = learner.state()
        second, counts = ({}, {}) if process is None else process.state()
        return RunState(
            step=step,
            learner=values,
            tensors=tensors | {f"{PROCESS}:{name}": tensor for name, tensor in second.items()},
            process_reward=counts,
            **place(),
            evaluations=evaluations,
            random=learner.gather_objects([random_state()]),
            reported=folder.written() if main else {},
            inputs=inputs or {},
            recipe=recipe.model_dump(mode="json"),
            environment={**describe_environment(), "run": folder.run_id},
        )

    return ModelWriter(folder, write, snapshot, recipe.checkpoint.keep, main)


@dataclass(frozen=True)
class Carried:
    """What of a run on sampled completions changes from step to step beside the weights, and so goes on where a checkpoint was taken."""

    learner: AccelerateLearner
    producer: Producer
    sync: Sync
    controllers: Sequence[Controller] = ()
    law: Law | None = None
    process: ProcessRewardLearner | None = None

    @cached_property
    def prompts(self) -> str:
        return digest((prompt.id, prompt.token_ids) for prompt in self.producer.prompts)

    def place(self) -> dict[str, Any]:
        """The fields of RunState that are not a learner's."""
        temperature = self.producer.temperature
        return {
            "order": self.producer.order.state_dict(),
            "arms": self.producer.arms_state(),
            "temperature": {} if temperature is None else temperature.state_dict(),
            "prompts": self.prompts,
            "pushes": self.sync.pushes,
            "controllers": [controller.state_dict() for controller in self.controllers],
            "law": {} if self.law is None else self.law.state_dict(),
        }

    def restore(self, state: RunState) -> None:
        """Everything but the weights and the random generators. Raises UserError for other data."""
        require_same_data(state, self.prompts, "prompts")
        second = {name: tensor for name, tensor in state.tensors.items() if name.startswith(f"{PROCESS}:")}
        self.learner.restore({name: tensor for name, tensor in state.tensors.items() if name not in second}, state.learner)
        if self.process is not None:
            self.process.restore({name.removeprefix(f"{PROCESS}:"): tensor for name, tensor in second.items()}, state.process_reward)
        with user_mistakes():
            self.producer.order.load_state_dict(state.order)
            for controller, saved in zip(self.controllers, state.controllers, strict=True):
                controller.load_state_dict(saved)
        if self.law is not None and state.law:
            self.law.load_state_dict(state.law)
        self.producer.load_arms_state(state.arms)
        if self.producer.temperature is not None:
            self.producer.temperature.load_state_dict(state.temperature)
        self.sync.pushes = state.pushes - 1  # the last one is the first that a resumed run makes again


def require_same_data(state: RunState, found: str, what: str) -> None:
    """Raises UserError unless the run that left ``state`` trained on the data of this digest. what: "prompts" or "examples"."""
    if state.prompts != found:
        raise UserError(
            f"the training {what} are not those of the checkpoint (other texts, another order or another tokenizer); "
            "resume with the data of the saved run, or start a new run"
        )


def digest(items: Iterable[object]) -> str:
    """SHA-256 of training data, in order."""
    found = hashlib.sha256()
    for item in items:
        found.update(repr(item).encode())
    return found.hexdigest()


def start_of(model: _Model, checkpoint: Path | None) -> _Model:
    """Where a learner's weights come from: the recipe's model, or ``checkpoint``, with the float32 that the optimizer works on."""
    if checkpoint is None:
        return model
    trust_copy(checkpoint, model.path, model.revision)
    return model.model_copy(update={"path": str(checkpoint), "revision": None})
