"""Updates from pairs that were sampled in the step, and the learner's older self beside which they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.config.schema import Model, PairLearnerSettings
from rltrain.learner.forward import PolicyForward
from rltrain.learner.preference_learner import PreferenceLearner
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.types import PairBatch, TokenRows
from rltrain.watchdog import Waiting, unwatched

__all__ = ["PREVIOUS", "PairLearner", "PairUpdates"]

PREVIOUS = "previous_logp"
_KEPT = "previous/"  # begins the names of the iterate's weights in a checkpoint


@dataclass(frozen=True)
class PairUpdates:
    """What one call of ``update_pairs`` did."""

    metrics: dict[str, float]  # averaged over the step's updates
    skipped: int  # updates dropped for a non-finite loss or gradient
    tokens: int  # read by the gradient passes


class PairLearner(PreferenceLearner):
    """A ``PreferenceLearner`` that takes several updates from a step's pairs and can keep an iterate of itself.

    temperature: of sampling, for ``annotate``; the log-probs of losses are at 1.
    """

    def __init__(
        self,
        model: Model,
        settings: PairLearnerSettings,
        *,
        temperature: float,
        max_tokens: int,
        total_updates: int,
        seed: int,
        waiting: Waiting = unwatched,
    ) -> None:
        super().__init__(model, settings, max_tokens=max_tokens, total_updates=total_updates, seed=seed, waiting=waiting)
        self.temperature = temperature

    def update_pairs(self, rows: TokenRows, batch: PairBatch, objective: PreferenceObjective) -> PairUpdates:
        """``settings.epochs`` passes of ``settings.updates`` optimizer updates over the pairs, whole prompts at a time.

        rows: the 2N of the pairs, chosen first. batch: the whole step, equal on every rank. Without a pair nothing happens.
        """
        if len(batch) == 0:
            return PairUpdates({"loss/total": 0.0, "learner/grad_norm": 0.0}, 0, 0)
        parts = [part for epoch in range(self.settings.epochs) for part in self._split(batch.prompt, epoch)]
        done = [self.update_examples(rows.rows(torch.cat([part, part + len(batch)])), batch.rows(part), objective) for part in parts]
        metrics = {name: sum(one.metrics[name] for one in done) / len(done) for name in done[0].metrics}
        return PairUpdates(metrics, sum(not one.stepped for one in done), sum(one.tokens for one in done))

    # the previous iterate --------------------------------------------------------------------------------------------

    def keep_iterate(self, model: Model) -> None:
        """The policy as it is becomes the model of ``previous_logp``. A collective."""
        if PREVIOUS not in self.frozen:
            self.use_frozen(PREVIOUS, None, model)
        held = self.frozen[PREVIOUS].state_dict()
        with torch.no_grad():
            for name, weight in self.model_weights():
                held[f"model.{name}"].copy_(weight)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state()
        if self.rank == 0 and PREVIOUS in self.frozen:
            tensors |= {_KEPT + name: weight.detach().cpu().clone() for name, weight in self._iterate(self.frozen[PREVIOUS])}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super().restore({name: one for name, one in tensors.items() if not name.startswith(_KEPT)}, values)
        if PREVIOUS in self.frozen:
            with torch.no_grad():
                for name, weight in self._iterate(self.frozen[PREVIOUS]):
                    weight.copy_(tensors[_KEPT + name])

    @staticmethod
    def _iterate(policy: PolicyForward) -> list[tuple[str, torch.nn.Parameter]]:
        """Tied weights once."""
        return [(name.removeprefix("model."), weight) for name, weight in policy.named_parameters()]
