"""The process reward model of an online run: a second model with its own optimizer, trained on outcomes.

It is a causal language model and uses the policy's output head and micro-batch planner. A token's reward is
its log-ratio to a reference, ``log pi_phi(y_t|..) - log pi_ref(y_t|..)``, arXiv:2502.01456; tokens and steps
need no labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rltrain.advantage.process import contrast_accuracy
from rltrain.config.schema import LearnerCore, Model, ProcessReward
from rltrain.learner.adapter_off import FrozenModel
from rltrain.learner.frozen_models import frozen_or_adapter_off
from rltrain.learner.micro_batches import inverse_index, row_micro_batches, shares_prompts
from rltrain.learner.packing import MicroBatch
from rltrain.learner.passes import token_log_probs, write_statistics
from rltrain.learner.trained_model import ModelOwner, NonFiniteError, TrainedModel
from rltrain.learner.update_step import optimizer_batches, optimizer_update
from rltrain.loss.objective import ObjectiveShare
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.registry import BoundMethod
from rltrain.tensor_ops import apply_mask, masked_mean
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.preference import CompletionFacts, ExampleTotals, LabelBatch, PolicySequences
from rltrain.watchdog import Deadline, no_deadline

__all__ = ["POLICY", "ProcessRewardLearner", "ProcessRewards"]

POLICY = "policy"  # value of ``reference`` for the log-probs of the sampling policy
_LOGP = frozenset({"logp"})
_TEMPERATURE = 1.0


@dataclass(frozen=True)
class ProcessRewards:
    """The result of one step."""

    reward: Tensor  # (B, T) nats, log-ratios of the model and its reference, 0 where the mask is off
    metrics: dict[str, float]


class ProcessRewardLearner(ModelOwner):
    """Trains the process reward model. ``version`` counts its updates.

    start: the weights to begin with, the model's own or a checkpoint's. origin: the model as it started,
    which is the reference if the settings name none. base_settings: the policy's, used except for the
    optimizer. adapter_from, deadline: as for ``TrainedModel``.
    """

    def __init__(
        self,
        start: Model,
        origin: Model,
        settings: ProcessReward,
        base_settings: LearnerCore,
        loss: BoundMethod,
        *,
        total_updates: int,
        seed: int,
        adapter_from: Path | None = None,
        deadline: Deadline = no_deadline,
    ) -> None:
        core = base_settings.model_copy(update={"optimizer": settings.optimizer})
        self.settings = settings
        self.objective = PreferenceObjective(loss)
        self.trained = TrainedModel(
            start,
            core,
            total_updates=total_updates,
            seed=seed,
            adapter_from=adapter_from,
            deadline=deadline,
        )
        self.reference: FrozenModel | None = None  # None: the sampling policy
        if settings.reference != POLICY:
            self.reference = frozen_or_adapter_off(settings.reference, origin, self.trained)

    def judge(self, rows: TokenRows, batch: TrainBatch) -> ProcessRewards:
        """The step's token rewards, after one pass of updates over the completions that have a verdict.

        batch: the whole step, equal on every rank, like the result. With ``update: after`` each row's reward
        comes from the forward pass that made its gradient, that is, from the weights before that update; with
        "before", from a further pass after all updates. Raises ValueError where no reward function gives
        verdicts, NonFiniteError as ``PolicyLearner.update`` does.
        """
        label = _verdicts(batch)
        ref_logp = self._reference_log_probs(rows, batch)
        counts = batch.mask.any(1)
        learns = counts & ~label.isnan()

        logp = torch.zeros(batch.mask.shape)
        updates: list[dict[str, float]] = []
        facts = _completion_facts(batch, ref_logp, label)
        for positions in optimizer_batches(self.trained, batch.group, self.settings.updates, epoch=0):
            unlabelled = positions[(counts & ~learns)[positions]]
            labelled = positions[learns[positions]]
            if len(unlabelled):
                write_statistics(self.trained, {"logp": logp}, rows, unlabelled, temperature=_TEMPERATURE)
            if len(labelled):
                updates.append(self._update(rows, facts.rows(labelled), batch.mask, labelled, logp))

        ratio = apply_mask(self.trained.sum_each({"logp": logp})["logp"] - ref_logp, batch.mask)
        reward = ratio
        if self.settings.update == "before":
            reward = apply_mask(self.token_log_probs(rows) - ref_logp, batch.mask)
        metrics = _average_metrics(updates)
        metrics["contrast"] = _contrast(ratio, label, batch.group, learns)
        metrics["abs"] = float(masked_mean(reward.abs(), batch.mask))
        return ProcessRewards(reward, {f"process_reward/{name}": value for name, value in metrics.items()})

    def _reference_log_probs(self, rows: TokenRows, batch: TrainBatch) -> Tensor:
        """(B, T) nats."""
        if self.reference is not None:
            return self.token_log_probs(rows, self.reference)
        if batch.old_logp is None:
            raise RuntimeError("the process reward's reference is the policy, but old_logp was not computed")
        return batch.old_logp

    def token_log_probs(self, rows: TokenRows, frozen: FrozenModel | None = None) -> Tensor:
        """(B, T) nats of each completion token, 0 after the last, float32 on the CPU, equal on every rank.

        frozen: the model to run; None: the trained one.
        """
        return token_log_probs(self.trained, rows, temperature=_TEMPERATURE, frozen=frozen)

    def _update(
        self,
        rows: TokenRows,
        facts: LabelBatch,
        mask: Tensor,
        positions: Tensor,
        logp: Tensor,
    ) -> dict[str, float]:
        """Metrics of one optimizer update over the rows at ``positions``, whose ``facts`` are in that order.

        logp: (B, T), receives this rank's log-probs from before the update.
        """
        complete = with_batch_statistics(facts, self.objective.loss).to(self.device)  # the only copies
        mask = mask.to(self.device)
        totals = ExampleTotals(len(positions))
        micro_batches = row_micro_batches(self.trained, rows, positions, share=shares_prompts(self.trained))
        indices = inverse_index(positions, len(rows))

        def loss_of(micro_batch: MicroBatch, statistics: Mapping[str, Tensor]) -> ObjectiveShare:
            counted = mask[micro_batch.rows][:, : micro_batch.width]
            policy = PolicySequences(apply_mask(statistics["logp"], counted).sum(1))
            return self.objective(policy, complete.rows(indices[micro_batch.rows]), totals)

        lr = self.lr
        try:
            record = {"logp": logp}
            result = optimizer_update(self.trained, micro_batches, loss_of, wants=_LOGP, record=record)
        except NonFiniteError as error:
            where = "its settings are in process_reward"
            raise NonFiniteError(f"the process reward model's {error} ({where})") from error
        return {**_rename_metrics(result.metrics), "lr": lr, "skipped_updates": float(not result.stepped)}


def _verdicts(batch: TrainBatch) -> Tensor:
    """(B,) 1 right, 0 wrong, NaN unknown."""
    counts = batch.mask.any(1) & ~batch.rewards.isnan()
    if batch.correct is None or bool(counts.any() & batch.correct[counts].isnan().all()):
        raise ValueError(
            "the process reward model learns which completions are right, but no reward function says so: "
            "add such a function to reward.functions (math_answer, with weight 0 if it must not count), or "
            "return a part named 'correct' in your own scores"
        )
    return batch.correct


def _completion_facts(batch: TrainBatch, ref_logp: Tensor, label: Tensor) -> LabelBatch:
    """The step's completions as the batch of a loss on labelled completions."""
    lengths = batch.mask.sum(1).clamp(min=1)
    facts = CompletionFacts(lengths, ref_logp=apply_mask(ref_logp, batch.mask).sum(1))
    return LabelBatch(facts, batch.group, label)


def _rename_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """An update's metrics without the prefix "loss/"; "loss" is the objective's, which is also the total."""
    renamed = {
        name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")
    }
    renamed["loss"] = renamed.pop("preference")
    del renamed["total"]
    return renamed | {"grad_norm": metrics["learner/grad_norm"]}


def _average_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates, and the number of skipped ones."""
    skipped = sum(update["skipped_updates"] for update in updates)
    names = updates[0].keys() if updates else ()
    means = {name: sum(update[name] for update in updates) / len(updates) for name in names}
    return means | {"skipped_updates": float(skipped)}


def _contrast(ratio: Tensor, label: Tensor, group: Tensor, learns: Tensor) -> float:
    """How often right completions of a prompt have the larger summed log-ratio than wrong ones.

    0.5 where there is nothing to compare.
    """
    if not bool(learns.any()):
        return 0.5
    return float(contrast_accuracy(ratio.sum(1)[learns].double(), label[learns].double(), group[learns]))
