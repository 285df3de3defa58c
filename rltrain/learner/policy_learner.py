"""Trains the policy on rollouts: annotates a step's rows and takes the optimizer updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rltrain.config.schema import Learner, Model
from rltrain.control.stage import PerUpdateControls
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.frozen_models import frozen_or_adapter_off
from rltrain.learner.head import STATISTICS
from rltrain.learner.micro_batches import inverse_index, row_micro_batches, shares_prompts
from rltrain.learner.packing import MicroBatch
from rltrain.learner.passes import compute_statistics, step_shape, write_statistics
from rltrain.learner.trained_model import ModelOwner, TrainedModel
from rltrain.learner.update_step import UpdateResult, optimizer_batches, optimizer_update
from rltrain.loss.objective import Objective, ObjectiveShare
from rltrain.types.policy import PolicyTokens, StepTotals, TokenRows, TrainBatch
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["FROZEN", "PolicyLearner", "UpdateStats"]

FROZEN = frozenset({"ref_logp", "teacher_logp"})  # statistics of models that are not trained
_STEP_STATISTICS = ("logp", "entropy")  # of the sampling policy, recorded in the gradient pass


@dataclass(frozen=True)
class UpdateStats:
    """The result of one call of ``update``. Tensors are on the CPU."""

    logp: Tensor  # (B, T) nats, the sampling policy's log-probs as the learner computes them
    entropy: Tensor  # (B, T) nats
    clipped: Tensor  # (B, T) number of the updates in which the policy loss clipped the token
    touched: Tensor | None  # (B, T) number of the updates in which a control had changed the token
    metrics: dict[str, float]  # averaged over the step's updates
    idle_rows: int  # rows that skipped the gradient pass
    skipped_updates: int  # updates dropped for a non-finite loss or gradient
    trained_rows: int
    trained_tokens: int


class PolicyLearner(ModelOwner):
    """Trains the policy on rollouts.

    temperature: of sampling, and of all log-probs. max_tokens: of a completion. deadline: as for
    ``TrainedModel``.
    """

    def __init__(
        self,
        model: Model,
        settings: Learner,
        *,
        temperature: float,
        max_tokens: int,
        total_updates: int,
        seed: int,
        adapter_from: Path | None = None,
        deadline: Deadline = no_deadline,
    ) -> None:
        self.settings = settings
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.trained = TrainedModel(
            model,
            settings,
            total_updates=total_updates,
            seed=seed,
            adapter_from=adapter_from,
            deadline=deadline,
        )
        self.frozen: dict[str, FrozenModel] = {}  # by statistic, "ref_logp" or "teacher_logp"

    def use_frozen(self, statistic: str, path: str | None, model: Model) -> None:
        """Load the model for ``statistic``, "ref_logp" or "teacher_logp", of ``annotate``.

        path: None means ``model`` as it started.
        """
        self.frozen[statistic] = frozen_or_adapter_off(path, model, self.trained)

    # passes -------------------------------------------------------------------------------------------------

    def annotate(
        self,
        rows: TokenRows,
        wants: frozenset[str],
        powers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Statistics of all rows ("logp", "entropy", "ref_logp", ...), (B, T) each, equal on every rank.

        powers: (B,) for each name "ref_log_mass:..." in ``wants``, the powers of the reference's
        probabilities that it sums.
        """
        powers = powers or {}
        missing = sorted((FROZEN & wants) - self.frozen.keys())
        if missing:
            raise RuntimeError(f"the model of {missing[0]} is not loaded; call use_frozen first")

        results: dict[str, Tensor] = {}
        for name in sorted(FROZEN & wants):
            frozen = self.frozen[name]
            results[name] = self._statistics(rows, frozenset({"logp"}), frozen=frozen)["logp"]
        for name, power in powers.items():
            frozen = self.frozen["ref_logp"]
            mass = frozenset({"log_mass:power"})
            statistics = self._statistics(rows, mass, frozen=frozen, row_values={"power": power})
            results[name] = statistics["log_mass:power"]
        policy_wants = wants - FROZEN - powers.keys()
        if policy_wants:
            results |= self._statistics(rows, policy_wants)
        return results

    def _statistics(
        self,
        rows: TokenRows,
        wants: frozenset[str],
        *,
        positions: Tensor | None = None,
        frozen: FrozenModel | None = None,
        row_values: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``compute_statistics`` at the sampling temperature; of all rows where ``positions`` is None."""
        positions = torch.arange(len(rows)) if positions is None else positions
        return compute_statistics(
            self.trained,
            rows,
            positions,
            wants,
            temperature=self.temperature,
            frozen=frozen,
            row_values=row_values,
        )

    # updates ------------------------------------------------------------------------------------------------

    def update(
        self,
        rows: TokenRows,
        batch: TrainBatch,
        objective: Objective,
        adjust: PerUpdateControls | None = None,
    ) -> UpdateStats:
        """``settings.epochs`` passes of ``settings.updates`` optimizer updates over the step's rows.

        batch: the whole step, equal on every rank. adjust: controls that depend on the current policy; each
        call receives one optimizer batch, with ``logp_now`` and ``entropy_now`` filled in as they need.
        Raises NonFiniteError after ``max_nonfinite`` dropped updates in a row.
        """
        shape = step_shape(rows)
        policy_stats = {name: torch.zeros(shape, device=self.device) for name in _STEP_STATISTICS}
        clipped = torch.zeros(shape, device=self.device)
        touched = torch.zeros(shape, device=self.device)
        updates: list[_Update] = []
        for epoch in range(self.settings.epochs):
            record = policy_stats if epoch == 0 else {}
            batches = optimizer_batches(self.trained, batch.group, self.settings.updates, epoch)
            for positions in batches:
                part = batch.rows(positions).to(self.device)  # the update's only copy of it
                if adjust is not None:
                    needs = adjust.needs
                    part = self._with_current_statistics(rows, part, positions, needs, first=not updates)
                    part = adjust(part)
                if part.touched is not None:
                    touched[positions.to(self.device), : part.touched.shape[1]] += part.touched
                updates.append(self._update_rows(rows, part, positions, objective, record, clipped))

        policy_stats = self.trained.sum_each(policy_stats | {"clipped": clipped})
        return UpdateStats(
            logp=policy_stats["logp"],
            entropy=policy_stats["entropy"],
            clipped=policy_stats["clipped"],
            touched=touched.cpu() if adjust is not None or batch.touched is not None else None,
            metrics=_average_metrics([update.metrics for update in updates]),
            idle_rows=sum(update.idle_rows for update in updates),
            skipped_updates=sum(not update.result.stepped for update in updates),
            trained_rows=sum(update.trained_rows for update in updates),
            trained_tokens=sum(update.trained_tokens for update in updates),
        )

    def _update_rows(
        self,
        rows: TokenRows,
        batch: TrainBatch,
        positions: Tensor,
        objective: Objective,
        record: dict[str, Tensor],
        clipped: Tensor,
    ) -> _Update:
        """One optimizer update over the rows at ``positions``; ``batch`` holds those rows, in that order, on
        the learner's device.

        clipped: (B, T) counts of the whole step, to which the update adds its own.
        """
        idle = torch.zeros(len(positions), dtype=torch.bool)
        if self.settings.skip_idle_rows:
            idle = objective.idle_rows(batch).cpu()
        if record and idle.any():
            write_statistics(self.trained, record, rows, positions[idle], temperature=self.temperature)

        active = positions[~idle]
        micro_batches = row_micro_batches(self.trained, rows, active, share=shares_prompts(self.trained))
        tokens, sequences = batch.totals_of_mask
        totals = StepTotals(tokens=tokens, sequences=sequences, max_tokens=self.max_tokens)
        indices = inverse_index(positions, len(rows))

        def loss_of(micro_batch: MicroBatch, statistics: Mapping[str, Tensor]) -> ObjectiveShare:
            part = batch.rows(indices[micro_batch.rows], width=micro_batch.width)
            share = objective(_policy_tokens(statistics), part, totals)
            if share.clipped is not None:
                clipped[micro_batch.rows.to(clipped.device), : micro_batch.width] += share.clipped
            return share

        result = optimizer_update(
            self.trained,
            micro_batches,
            loss_of,
            wants=_gradient_pass_statistics(objective.needs).union(record),
            temperature=self.temperature,
            record=record,
        )
        lengths = [len(rows.prompts[row]) + len(rows.completions[row]) for row in active.tolist()]
        return _Update(
            result=result,
            notes=batch.notes,
            idle_rows=int(idle.sum()),
            trained_rows=len(active),
            trained_tokens=sum(lengths),
        )

    def _with_current_statistics(
        self, rows: TokenRows, part: TrainBatch, positions: Tensor, needs: frozenset[str], *, first: bool
    ) -> TrainBatch:
        """``part`` with the current policy's statistics ``needs``.

        In a step's first update the old statistics are current. ``logp_now`` and ``entropy_now`` are fields;
        further statistics of the head ("<statistic>_now") go to ``extra``.
        """
        known = {"logp_now": part.old_logp, "entropy_now": part.old_entropy} if first else {}
        values = {name: value for name, value in known.items() if value is not None}
        missing = {name: name.removesuffix("_now") for name in needs if name not in values}
        if missing:
            current = self._statistics(rows, frozenset(missing.values()), positions=positions)
            values |= {
                name: current[statistic][positions].to(self.device) for name, statistic in missing.items()
            }

        fields = {"logp_now", "entropy_now"} & needs
        extra = {name: value for name, value in values.items() if name in needs - fields}
        return part.replace(**{name: values[name] for name in fields}).with_extra(**extra)


@dataclass(frozen=True)
class _Update:
    """One optimizer update of a step."""

    result: UpdateResult
    notes: Mapping[str, float]  # what the per-update controls report
    idle_rows: int
    trained_rows: int
    trained_tokens: int

    @property
    def metrics(self) -> dict[str, float]:
        return self.result.metrics | {f"control/{name}": value for name, value in self.notes.items()}


def _average_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means over the updates."""
    return {name: sum(update[name] for update in metrics) / len(metrics) for name in metrics[0]}


def _gradient_pass_statistics(needs: frozenset[str]) -> frozenset[str]:
    """The statistics of ``needs`` that the gradient pass computes; the others are in the batch."""
    known = ("entropy", "entropy_grad", *STATISTICS)
    return frozenset({"logp"} | {name for name in needs if name.partition(":")[0] in known})


def _policy_tokens(statistics: Mapping[str, Tensor]) -> PolicyTokens:
    extra = {name: value for name, value in statistics.items() if name not in ("logp", "entropy")}
    return PolicyTokens(statistics["logp"], statistics.get("entropy"), extra)
