"""Updates from pairs that were sampled in the step, and the previous iterate to which losses compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain.config.schema import Model, RolloutLearner
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.forward import PolicyForward
from rltrain.learner.frozen_models import frozen_or_adapter_off, load_frozen
from rltrain.learner.passes import compute_statistics
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.learner.shards import gather_rows, local_part, put_full
from rltrain.learner.trained_model import ModelOwner
from rltrain.learner.update_step import optimizer_batches
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.types.policy import TokenRows
from rltrain.types.preference import PairBatch
from rltrain.types.tensor_parts import TensorPart, select_tensors
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["PREVIOUS", "PairLearner", "PairUpdates"]

PREVIOUS = "previous_logp"
_PREVIOUS_WEIGHTS = "previous/"  # prefix of the iterate's weights in a checkpoint


@dataclass(frozen=True)
class PairUpdates:
    """The result of one call of ``update_pairs``."""

    metrics: dict[str, float]  # averaged over the step's updates
    skipped: int  # updates dropped for a non-finite loss or gradient
    tokens: int  # tokens read by the gradient passes


class PairLearner(ModelOwner):
    """Takes several updates from a step's pairs and can keep a previous iterate of its weights.

    temperature: of sampling, for ``annotate``; the log-probs of losses are at temperature 1. adapter_from,
    deadline: as for ``TrainedModel``.
    """

    def __init__(
        self,
        model: Model,
        settings: RolloutLearner,
        *,
        temperature: float,
        total_updates: int,
        seed: int,
        adapter_from: Path | None = None,
        deadline: Deadline = no_deadline,
    ) -> None:
        self.settings = settings
        self.temperature = temperature
        self.preferences = PreferenceLearner(
            model,
            settings,
            total_updates=total_updates,
            seed=seed,
            adapter_from=adapter_from,
            deadline=deadline,
        )
        self.trained = self.preferences.trained
        self.frozen: dict[str, FrozenModel] = {}  # by statistic, "ref_logp" or "previous_logp"

    def use_frozen(self, statistic: str, path: str | None, model: Model) -> None:
        """Load the model for ``statistic``. path: None means ``model`` as it started."""
        self.frozen[statistic] = frozen_or_adapter_off(path, model, self.trained)

    def annotate(self, rows: TokenRows, wants: frozenset[str]) -> dict[str, Tensor]:
        """Statistics of all rows at the sampling temperature, (B, T) each, equal on every rank."""
        everything = torch.arange(len(rows))
        return compute_statistics(self.trained, rows, everything, wants, temperature=self.temperature)

    def log_probs(self, rows: TokenRows, *, sides: int, frozen: FrozenModel | None = None) -> Tensor:
        """``PreferenceLearner.log_probs``."""
        return self.preferences.log_probs(rows, sides=sides, frozen=frozen)

    def update_pairs(self, rows: TokenRows, batch: PairBatch, objective: PreferenceObjective) -> PairUpdates:
        """``settings.epochs`` passes of ``settings.updates`` optimizer updates, each of whole prompts.

        rows: the 2N rows of the pairs, chosen ones first. batch: the whole step, equal on every rank. Without
        pairs it does nothing.
        """
        if len(batch) == 0:
            return PairUpdates({"loss/total": 0.0, "learner/grad_norm": 0.0}, 0, 0)

        parts = [
            positions
            for epoch in range(self.settings.epochs)
            for positions in optimizer_batches(self.trained, batch.prompt, self.settings.updates, epoch)
        ]
        updates = []
        for positions in parts:
            part_rows = rows.rows(torch.cat([positions, positions + len(batch)]))
            updates.append(self.preferences.update_examples(part_rows, batch.rows(positions), objective))

        names = updates[0].metrics
        metrics = {name: sum(update.metrics[name] for update in updates) / len(updates) for name in names}
        skipped = sum(not update.stepped for update in updates)
        return PairUpdates(metrics, skipped, sum(update.tokens for update in updates))

    # the previous iterate -----------------------------------------------------------------------------------

    def keep_iterate(self, model: Model) -> None:
        """Make the current policy the model of ``previous_logp``. A collective."""
        if PREVIOUS not in self.frozen:
            self.frozen[PREVIOUS] = load_frozen(None, model, self.trained)
        iterate = self._iterate().state_dict()
        for name, weight in self.model_weights():
            put_full(iterate[f"model.{name}"], weight)

    def _iterate(self) -> PolicyForward:
        """The previous iterate, a model of its own whatever is trained."""
        iterate = self.frozen[PREVIOUS]
        assert isinstance(iterate, PolicyForward)
        return iterate

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the trained model's optimizer, and the previous iterate's weights."""
        yield from self.trained.optimizer_state()
        if PREVIOUS in self.frozen:
            for name, weight in _named_parameters(self._iterate()):
                yield _PREVIOUS_WEIGHTS + name, gather_rows(weight).detach()

    def parts(self) -> Iterator[TensorPart]:
        """``TrainedModel.parts``, and those of the previous iterate's weights."""
        yield from self.trained.parts()
        if PREVIOUS in self.frozen:
            for name, weight in _named_parameters(self._iterate()):
                yield local_part(_PREVIOUS_WEIGHTS + name, weight, self.rank, self.world_size)

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore ``optimizer_state`` and ``state``."""
        trained = select_tensors(tensors, lambda name: None if name.startswith(_PREVIOUS_WEIGHTS) else name)
        self.trained.restore(trained, values)
        if PREVIOUS in self.frozen:
            for name, weight in _named_parameters(self._iterate()):
                put_full(weight, tensors[_PREVIOUS_WEIGHTS + name].to(self.device))


def _named_parameters(policy: PolicyForward) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters by name inside the model; tied weights once."""
    return [(name.removeprefix("model."), weight) for name, weight in policy.named_parameters()]
