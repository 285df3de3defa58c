"""Everything that a run writes, and how it resumes from it: reports, models, checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rltrain.build.context import RunContext
from rltrain.checkpoint.background_save import BackgroundSave
from rltrain.checkpoint.export import export_adapter, export_model
from rltrain.checkpoint.model_card import model_card
from rltrain.checkpoint.random_state import random_state
from rltrain.checkpoint.run_folder import describe_environment
from rltrain.checkpoint.run_state import RunState, is_sharded, read_state, restoring, write_state
from rltrain.config.schema import Checkpoint, Model, OfflineReport, Report, SampledRecipe
from rltrain.control.coefficient import Controller
from rltrain.data.tokenization import Tokenization
from rltrain.errors import UserError, user_mistakes
from rltrain.learner.process_reward import ProcessRewardLearner
from rltrain.learner.ranks import background_group
from rltrain.learner.trained_model import ModelOwner
from rltrain.remote_code import trust_copy
from rltrain.report.law import Law
from rltrain.report.progress import Progress
from rltrain.report.reporter import Reporter
from rltrain.report.sinks import open_sinks
from rltrain.report.token_numbers import STEPS, TokenNumbers
from rltrain.report.transcripts import Transcripts
from rltrain.rollout.source import PromptedSource
from rltrain.sync.adapter import AdapterSync
from rltrain.sync.colocated import Sync
from rltrain.train.replayed import NoPush
from rltrain.train.saving import ModelWriter
from rltrain.types.tensor_parts import TensorPart, select_tensors

# folder of the process reward model below the policy's, and prefix of its optimizer's tensors
PROCESS = "process_reward"
QUIET = Reporter(None, None, None)  # reports nothing
SAMPLES = 10  # completions that a long run shows on the terminal
_Model = TypeVar("_Model", bound=Model)


def build_reporter(
    settings: Report | OfflineReport,
    recipe: Mapping[str, Any],
    context: RunContext,
    steps: int,
    resumed: RunState | None,
    transcripts: int | None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Reporter:
    """The reporter of a run of ``steps`` steps; only the main process reports.

    recipe: as plain data, for trackers. transcripts: prompts per step whose completions are kept; None: the
    run samples no completions. decode: ids to text, for runs that know numbers of single tokens.
    """
    if not context.process.is_main:
        return QUIET
    folder = context.folder
    progress = Progress(steps, start=0 if resumed is None else resumed.step, legend=True)
    sinks = open_sinks(folder.path, settings.sinks, settings.project, recipe, progress.warn, folder.run_id)
    every = max(1, steps // STEPS)
    numbers = None if decode is None else TokenNumbers(decode, every)
    log = None if transcripts is None else Transcripts(folder.transcripts, transcripts, numbers)
    return Reporter(sinks, log, progress, tables_every=every, samples_every=max(5, steps // SAMPLES))


def build_model_writer(
    settings: Checkpoint,
    recipe: Mapping[str, Any],
    tokenization: Tokenization,
    learner: ModelOwner,
    progress: Callable[[], Mapping[str, Any]],
    context: RunContext,
    process: ProcessRewardLearner | None = None,
) -> ModelWriter:
    """Every rank takes part in gathering weights and states; the main process writes.

    recipe: as plain data. progress: returns the fields of RunState that are not a learner's. process: the
    process reward model; its weights get a separate folder below the policy's, and the rest of its state is
    saved with the policy's.
    """
    folder = context.folder
    is_main = context.process.is_main

    def optimizer_tensors() -> Iterator[tuple[str, Tensor]]:
        yield from learner.optimizer_state()
        for name, tensor in () if process is None else process.optimizer_state():
            yield f"{PROCESS}:{name}", tensor

    def write(out: Path, step: int, results: Mapping[str, float], state: RunState | None) -> Path:
        is_checkpoint = state is not None
        if not is_main:  # gathering is a collective, here in the order in which the main process writes
            drain(stored_weights(learner, is_checkpoint=is_checkpoint))
            drain(() if process is None else stored_weights(process, is_checkpoint=is_checkpoint))
            drain(() if state is None else optimizer_tensors())
            return out

        card = model_card(recipe, results, step)
        tokenizer = tokenization.tokenizer

        def write_extra(out_folder: Path) -> None:
            if process is not None:
                export_learner(
                    out_folder / PROCESS, process, tokenizer, card, None, is_checkpoint=is_checkpoint
                )
            if state is not None:
                write_state(out_folder, state, optimizer_tensors())

        return export_learner(out, learner, tokenizer, card, write_extra, is_checkpoint=is_checkpoint)

    def snapshot(step: int, evaluations: Sequence[Mapping[str, float]]) -> RunState:
        return RunState(
            step=step,
            learner=learner.state(),
            process_reward={} if process is None else process.state(),
            **progress(),
            evaluations=evaluations,
            random=learner.gather([random_state()]),
            reported=folder.file_sizes() if is_main else {},
            inputs=context.digests,
            recipe=recipe,
            environment={**describe_environment(), "run": folder.run_id},
        )

    background = _background_save(settings, context, partial(_trained_parts, learner, process))
    return ModelWriter(folder, write, snapshot, settings.keep, is_main, background)


def _trained_parts(learner: ModelOwner, process: ProcessRewardLearner | None) -> Iterator[TensorPart]:
    """This rank's parts of everything that is trained."""
    yield from learner.parts()
    for part in () if process is None else process.parts():
        yield replace(part, name=f"{PROCESS}:{part.name}")


def _background_save(
    settings: Checkpoint, context: RunContext, parts: Callable[[], Iterator[TensorPart]]
) -> BackgroundSave | None:
    """What writes sharded checkpoints; None where they are whole."""
    if settings.format == "whole":
        return None
    prune = partial(context.folder.prune_checkpoints, settings.keep)
    return BackgroundSave(context.process, background_group(), parts, prune)


def stores_adapter(learner: ModelOwner, *, is_checkpoint: bool) -> bool:
    """Whether a folder holds the learner's adapter alone: a checkpoint always does."""
    adapter = learner.trained.adapter
    return adapter is not None and (is_checkpoint or adapter.settings.export == "adapter")


def stored_weights(learner: ModelOwner, *, is_checkpoint: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights that a folder of the learner holds. A collective."""
    if stores_adapter(learner, is_checkpoint=is_checkpoint):
        return learner.adapter_weights()
    return learner.weights()


def export_learner(
    out: Path,
    learner: ModelOwner,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    extra: Callable[[Path], None] | None,
    *,
    is_checkpoint: bool,
) -> Path:
    """Writes the learner's model, or its adapter, to the new folder ``out``. A collective."""
    weights = stored_weights(learner, is_checkpoint=is_checkpoint)
    if stores_adapter(learner, is_checkpoint=is_checkpoint):
        assert learner.trained.adapter is not None
        config = learner.trained.adapter_config()
        storage = learner.trained.adapter.settings.quantize
        return export_adapter(out, tokenizer, card, config, weights, extra, storage)
    return export_model(out, learner.model, tokenizer, card, weights, extra, ties=learner.names.ties)


def build_outputs(
    recipe: SampledRecipe,
    context: RunContext,
    steps: int,
    resumed: RunState | None,
    tokenization: Tokenization,
    learner: ModelOwner,
    progress: Callable[[], Mapping[str, Any]],
    process: ProcessRewardLearner | None = None,
) -> tuple[Reporter, ModelWriter]:
    """The reporter and the model writer of a run on sampled completions, which quote the whole recipe."""
    plain = recipe.model_dump(mode="json")
    transcripts = recipe.report.transcripts
    decode = tokenization.decode
    reporter = build_reporter(recipe.report, plain, context, steps, resumed, transcripts, decode)
    writer = build_model_writer(recipe.checkpoint, plain, tokenization, learner, progress, context, process)
    return reporter, writer


class Restorable(Protocol):
    def load_state_dict(self, state: RunState) -> None: ...


def resume(checkpoint: Path | None, training_state: Restorable) -> RunState | None:
    """Loads ``training_state`` from the checkpoint and returns the run's state; None in a new run."""
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    with restoring(checkpoint):
        training_state.load_state_dict(state)
    return state


def drain(tensors: Iterable[object]) -> None:
    """Takes part in gathering a stream of tensors, of which this rank keeps none."""
    for _ in tensors:
        pass


@dataclass(frozen=True)
class TrainingState:
    """The state of a run on sampled completions that changes from step to step besides the weights;
    part of every checkpoint.
    """

    learner: ModelOwner
    source: PromptedSource
    sync: Sync | AdapterSync | NoPush
    controllers: Sequence[Controller] = ()
    law: Law | None = None
    process: ProcessRewardLearner | None = None

    @cached_property
    def prompts(self) -> str:
        """Digest of the training prompts; empty where the source draws from none."""
        if self.source.prompts is None:
            return ""
        return data_digest((prompt.id, prompt.token_ids) for prompt in self.source.prompts)

    def state_dict(self) -> dict[str, Any]:
        """The fields of RunState that are not a learner's."""
        return {
            **self.source.state_dict(),
            "prompts": self.prompts,
            "pushes": self.sync.pushes,
            "controllers": [controller.state_dict() for controller in self.controllers],
            "law": {} if self.law is None else self.law.state_dict(),
        }

    def load_state_dict(self, state: RunState) -> None:
        """Restores all but the weights and the random generators. Raises UserError if the data differ."""
        if self.source.prompts is not None:
            require_same_data(state, self.prompts, "prompts")
        prefix = f"{PROCESS}:"
        tensors = select_tensors(state.tensors, lambda name: None if name.startswith(prefix) else name)
        self.learner.restore(tensors, state.learner)
        if self.process is not None:
            process_tensors = select_tensors(
                state.tensors, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None
            )
            self.process.restore(process_tensors, state.process_reward)
        with user_mistakes():
            self.source.load_state_dict(
                {
                    "order": state.order,
                    "sources": state.sources,
                    "temperature": state.temperature,
                    "ahead": state.ahead,
                }
            )
            for controller, saved in zip(self.controllers, state.controllers, strict=True):
                controller.load_state_dict(saved)
        if self.law is not None and state.law:
            self.law.load_state_dict(state.law)
        self.sync.pushes = state.pushes - 1  # a resumed run begins by repeating the last push


def require_same_data(state: RunState, digest: str, kind: str) -> None:
    """Raises UserError unless the run that saved ``state`` trained on the data with this digest.

    kind: "prompts" or "examples".
    """
    if state.prompts != digest:
        raise UserError(
            f"the training {kind} are not those of the checkpoint (other texts, another order or another "
            "tokenizer); resume with the data of the saved run, or start a new run"
        )


def data_digest(items: Iterable[object]) -> str:
    """SHA-256 of training data, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def initial_model(model: _Model, checkpoint: Path | None) -> _Model:
    """The model whose weights a learner loads: the recipe's, or ``checkpoint``, which has the optimizer's
    float32 weights. Those of a sharded checkpoint are restored with the optimizer's state; a checkpoint of an
    adapter has only the adapter's (``saved_adapter``).
    """
    if checkpoint is None or model.adapter is not None or is_sharded(checkpoint):
        return model
    trust_copy(checkpoint, model.path, model.revision)
    return model.model_copy(update={"path": str(checkpoint), "revision": None})


def saved_adapter(model: Model, checkpoint: Path | None) -> Path | None:
    """The folder of the adapter that a learner continues with; None: its adapter, if any, is new, or that of
    a sharded checkpoint, which is restored with the optimizer's state.
    """
    return None if model.adapter is None or checkpoint is None or is_sharded(checkpoint) else checkpoint
