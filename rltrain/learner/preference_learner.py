"""Updates from judged examples: pairs of completions, or single ones.

N pairs have 2N rows: the chosen completions, then the rejected ones, in the same order. Both rows of a pair
are in the same micro-batch. As for rollouts, every rank holds the whole optimizer batch and plans the same
micro-batches; statistics are computed over the whole batch before it is divided, and losses are divided by
its number of examples, so that the layout does not change the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rltrain.config.schema import Degree, LearnerCore, Model
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.degree_head import DegradedRows, logit_names
from rltrain.learner.forward import PolicyForward
from rltrain.learner.micro_batches import MicroBatches, example_micro_batches, shares_prompts, tokens_read
from rltrain.learner.packing import MicroBatch
from rltrain.learner.passes import run_pass, token_log_probs
from rltrain.learner.ranks import require_no_zero
from rltrain.learner.row_scoring import LOG_PROBS, LossInputs, RowScoring
from rltrain.learner.trained_model import ModelOwner, TrainedModel
from rltrain.learner.update_step import optimizer_update
from rltrain.loss.objective import ObjectiveShare
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.spo import DegreeLoss
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.needs import LOGP_NOW, MISMATCHED
from rltrain.types.policy import TokenRows
from rltrain.types.preference import ExampleTotals, LabelBatch, PairBatch
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["ExampleUpdate", "PreferenceLearner", "lengths_of", "pair_rows", "scored_tokens"]

_TEMPERATURE = 1.0  # of the log-probs that preference losses compare


@dataclass(frozen=True)
class ExampleUpdate:
    """The result of one update."""

    metrics: dict[str, float]  # the loss and the means of its metrics, over the update's examples
    stepped: bool  # False: dropped for a non-finite loss or gradient
    tokens: int  # tokens read by the gradient pass, prompts included
    shared: bool  # whether the prompts of pairs were read once


def pair_rows(
    prompts: Sequence[tuple[int, ...]],
    chosen: Sequence[tuple[int, ...]],
    rejected: Sequence[tuple[int, ...]],
) -> TokenRows:
    """The 2N rows of N pairs."""
    return TokenRows((*prompts, *prompts), (*chosen, *rejected))


def lengths_of(rows: TokenRows) -> Tensor:
    """(R,) scored tokens of each row."""
    return torch.tensor([*map(len, rows.completions)] if rows.scored is None else [*map(sum, rows.scored)])


def scored_tokens(rows: TokenRows, positions: Tensor, width: int) -> Tensor | None:
    """(r, width) bool, the scored tokens of the rows at ``positions`` (r,); None if all tokens are."""
    if rows.scored is None:
        return None
    mask = torch.zeros(len(positions), width, dtype=torch.bool)
    for line, position in enumerate(positions.tolist()):
        flags = rows.scored[position]
        mask[line, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
    return mask


def _with_degraded(rows: TokenRows, degraded: DegradedRows) -> TokenRows:
    """The 2N rows of pairs, then the N degraded completions with the same prompts."""
    count = len(degraded.completions)
    return TokenRows(
        (*rows.prompts, *rows.prompts[:count]), (*rows.completions, *degraded.completions), rows.scored
    )


class PreferenceLearner(ModelOwner):
    """Trains a model on judged examples.

    scoring: the number of a row that losses compare, by default the log-prob of its completion. degree: of a
    degree head beside a model that predicts tokens. adapter_from, deadline: as for ``TrainedModel``.
    """

    def __init__(
        self,
        model: Model,
        settings: LearnerCore,
        *,
        total_updates: int,
        seed: int,
        scoring: RowScoring = LOG_PROBS,
        degree: Degree | None = None,
        adapter_from: Path | None = None,
        deadline: Deadline = no_deadline,
    ) -> None:
        self.scoring = scoring
        self.degree = degree
        if degree is not None:
            require_no_zero("loss.degree")
        self.trained = TrainedModel(
            model,
            settings,
            total_updates=total_updates,
            seed=seed,
            load=scoring.load,
            wrap=scoring.wrap if degree is None else partial(PolicyForward, degree=degree),
            adapter_from=adapter_from,
            deadline=deadline,
        )
        self._shares_prompts = shares_prompts(self.trained)

    # log-probs ----------------------------------------------------------------------------------------------

    def log_probs(self, rows: TokenRows, *, sides: int, frozen: FrozenModel | None = None) -> Tensor:
        """(R,) nats, the log-prob of each row's completion, or a scalar head's reward; equal on every rank.

        Float32 on the CPU. sides: rows per example, 2 for the rows of pairs. frozen: the model to run; None:
        the trained one.
        """
        statistic = self.scoring.statistic
        return self._row_numbers(rows, sides, frozenset({statistic}), frozen)[statistic]

    def log_probs_and_entropy(self, rows: TokenRows, *, sides: int) -> tuple[Tensor, Tensor | None]:
        """``log_probs`` of the trained model, and (R,) nats, each completion's summed entropies, in one pass.

        The second is None where the model's output is no distribution over tokens.
        """
        if not self.scoring.predicts_tokens:
            return self.log_probs(rows, sides=sides), None
        numbers = self._row_numbers(rows, sides, frozenset({"logp", "entropy"}), None)
        return numbers["logp"], numbers["entropy"]

    def token_log_probs(self, rows: TokenRows, frozen: FrozenModel | None = None) -> Tensor:
        """(R, T) nats of each completion token, 0 after the last, float32 on the CPU, equal on every rank.

        frozen: as for ``log_probs``.
        """
        return token_log_probs(self.trained, rows, temperature=_TEMPERATURE, frozen=frozen)

    def loss_inputs(self, numbers: Tensor, sides: int) -> LossInputs:
        """The arguments of a loss from one number (R,) for each row."""
        return self.scoring.loss_inputs(numbers, sides)

    def _row_numbers(
        self,
        rows: TokenRows,
        sides: int,
        wants: frozenset[str],
        frozen: FrozenModel | None,
    ) -> dict[str, Tensor]:
        """(R,) numbers for each of ``wants``, float32 on the CPU, equal on every rank."""
        module = self.trained.wrapped_model if frozen is None else frozen
        chunk = self.trained.head_chunk
        results = {name: torch.zeros(len(rows), device=self.device) for name in sorted(wants)}

        def forward(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
            with self.trained.accelerator.autocast():
                statistics = module(micro_batch, temperature=_TEMPERATURE, wants=wants, chunk=chunk)
                return self._numbers_of(statistics, rows, micro_batch)

        run_pass(module, self._micro_batches(rows, sides)[0], forward, results)
        return self.trained.sum_each(results)

    def _numbers_of(
        self, statistics: Mapping[str, Tensor], rows: TokenRows, micro_batch: MicroBatch
    ) -> dict[str, Tensor]:
        """(r,) numbers of the micro-batch's rows, of their scored tokens only."""
        mask = scored_tokens(rows, micro_batch.rows, micro_batch.width)
        if mask is not None:
            mask = mask.to(self.device)
            statistics = {name: values.where(mask, 0.0) for name, values in statistics.items()}
        return self.scoring.row_numbers(statistics)

    def _micro_batches(self, rows: TokenRows, sides: int) -> tuple[MicroBatches, bool]:
        build = self.scoring.build_rows
        return example_micro_batches(self.trained, rows, sides, share=self._shares_prompts, build_rows=build)

    # updates ------------------------------------------------------------------------------------------------

    def update_examples(
        self,
        rows: TokenRows,
        batch: PairBatch | LabelBatch,
        objective: PreferenceObjective,
        mismatched: TokenRows | None = None,
        degraded: DegradedRows | None = None,
    ) -> ExampleUpdate:
        """One optimizer update over all rows.

        batch: the whole optimizer batch, equal on every rank, with the frozen models' log-probs in it.
        mismatched: for KTO, row i is prompt i with another prompt's completion. degraded: for the degree
        head, of each pair's chosen completion. Raises NonFiniteError after ``max_nonfinite`` dropped updates
        in a row.
        """
        sides = 2 if isinstance(batch, PairBatch) else 1
        current = self._with_logp_now(rows, batch, objective.needs, sides, mismatched)
        complete = with_batch_statistics(current, objective.loss).to(self.device)  # the update's only copy
        totals = ExampleTotals(examples=len(complete))
        all_rows = rows if degraded is None else _with_degraded(rows, degraded)
        per_example = len(all_rows) // len(complete)
        micro_batches, shared = self._micro_batches(all_rows, per_example)
        statistic = self.scoring.statistic
        degrees = logit_names(0 if self.degree is None or degraded is None else self.degree.levels)

        def loss_of(micro_batch: MicroBatch, statistics: Mapping[str, Tensor]) -> ObjectiveShare:
            numbers = self._numbers_of(statistics, all_rows, micro_batch)
            count = len(micro_batch.rows) // per_example
            examples = micro_batch.rows[:count]  # each example's first row
            inputs = self.loss_inputs(numbers[statistic][: sides * count], sides)
            share = objective(inputs, complete.rows(examples), totals)
            if degraded is None or self.degree is None:
                return share
            logits = torch.stack([numbers[name][sides * count :] for name in degrees], dim=1)
            degree = degraded.degree[examples.cpu()].to(logits.device)
            return DegreeLoss(self.degree.weight)(share, logits, degree, totals)

        wants = frozenset({statistic, *degrees})
        result = optimizer_update(self.trained, micro_batches, loss_of, wants=wants)
        return ExampleUpdate(result.metrics, result.stepped, tokens_read(all_rows, shared=shared), shared)

    def _with_logp_now(
        self,
        rows: TokenRows,
        batch: PairBatch | LabelBatch,
        needs: frozenset[str],
        sides: int,
        mismatched: TokenRows | None,
    ) -> PairBatch | LabelBatch:
        """``batch`` with the model's log-probs before this update, where the loss's statistics need them."""
        if isinstance(batch, LabelBatch) and MISMATCHED in needs:
            if mismatched is None or batch.mismatched is None:
                needed = "the loss compares prompts with other prompts' completions"
                raise ValueError(f"{needed}, but mismatched rows are missing")
            logp = self.log_probs(mismatched, sides=1)
            facts = dataclasses.replace(batch.mismatched, logp_now=logp)
            batch = dataclasses.replace(batch, mismatched=facts)
        if LOGP_NOW not in needs:
            return batch

        logp = self.log_probs(rows, sides=sides)
        if isinstance(batch, LabelBatch):
            facts = dataclasses.replace(batch.completion, logp_now=logp)
            return dataclasses.replace(batch, completion=facts)
        chosen, rejected = logp.chunk(2)
        return dataclasses.replace(
            batch,
            chosen=dataclasses.replace(batch.chosen, logp_now=chosen),
            rejected=dataclasses.replace(batch.rejected, logp_now=rejected),
        )
