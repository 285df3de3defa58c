"""The process reward model of an online run: a second model with an optimizer of its own, which learns from the step's outcomes.

It is a causal language model and goes through the policy's memory path and micro-batch planner. A token's reward is its log-ratio to
a reference, ``log pi_phi(y_t|..) - log pi_ref(y_t|..)``, arXiv:2502.01456; nobody labels tokens or steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.advantage.process import contrast_accuracy
from rltrain.config.schema import Learner, LearnerCore, Model, ProcessReward
from rltrain.learner.accelerate_learner import AccelerateLearner, NonFiniteError
from rltrain.learner.backend import set_mode
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import prepared
from rltrain.registry import BoundMethod
from rltrain.tensor_ops import masked, masked_mean
from rltrain.types import CompletionFacts, ExampleTotals, LabelBatch, PolicySequences, TokenRows, TrainBatch
from rltrain.watchdog import Waiting, unwatched

__all__ = ["POLICY", "Judged", "ProcessRewardLearner"]

POLICY = "policy"  # as ``reference``: the log-probs of the policy that sampled


@dataclass(frozen=True)
class Judged:
    """What one step gave."""

    reward: Tensor  # (B, T) nats, log-ratios of the model and its reference, 0 where the mask is off
    metrics: dict[str, float]


class ProcessRewardLearner(AccelerateLearner):
    """Owns the reward model's weights. ``version`` counts its updates.

    start: the weights to begin with, the model's own or a checkpoint's. origin: the model as it started, which is its reference where
    the settings name none.
    """

    def __init__(
        self,
        start: Model,
        origin: Model,
        settings: ProcessReward,
        like: LearnerCore,
        loss: BoundMethod,
        *,
        max_tokens: int,
        total_updates: int,
        seed: int,
        waiting: Waiting = unwatched,
    ) -> None:
        core: dict[str, Any] = {name: getattr(like, name) for name in LearnerCore.model_fields} | {"optimizer": settings.optimizer}
        learner = Learner(**core, updates=settings.updates)
        super().__init__(start, learner, temperature=1.0, max_tokens=max_tokens, total_updates=total_updates, seed=seed, waiting=waiting)
        self.objective = PreferenceObjective(loss)
        self.before, self.by_policy = settings.update == "before", settings.reference == POLICY
        if not self.by_policy:
            self.use_frozen("ref_logp", settings.reference, origin)

    def judge(self, rows: TokenRows, batch: TrainBatch) -> Judged:
        """The step's token rewards, and one pass of updates over the completions that somebody called right or wrong.

        batch: the whole step, equal on every rank, as is what comes back. With ``update: after`` each row's reward comes from the
        forward pass that made its gradient, so from the weights before that update; with "before" from one more pass after all of
        them. Raises ValueError where rewards came without a verdict, NonFiniteError as ``AccelerateLearner.update`` does.
        """
        label = _verdicts(batch)
        reference, logp = self._reference(rows, batch), torch.zeros(batch.mask.shape)
        sums = CompletionFacts(batch.mask.sum(1).clamp(min=1), ref_logp=masked(reference, batch.mask).sum(1))
        facts = LabelBatch(sums, batch.group, label)
        counts = batch.mask.any(1)
        learns = counts & ~label.isnan()
        parts: list[dict[str, float]] = []
        skipped = 0
        for positions in self._split(batch.group, epoch=0):
            chosen, others = positions[learns[positions]], positions[(counts & ~learns)[positions]]
            if len(others):
                self._collect_into({"logp": logp}, rows, others)
            if len(chosen):
                metrics, stepped = self._learn(rows, facts.rows(chosen), batch.mask, chosen, logp)
                parts, skipped = [*parts, metrics], skipped + (not stepped)
        before = masked(self._sum(logp).cpu() - reference, batch.mask)
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in (parts[0] if parts else {})}
        metrics |= {"skipped_updates": float(skipped), "contrast": _contrast(before, label, batch.group, learns)}
        reward = masked(self.annotate(rows, frozenset({"logp"}))["logp"] - reference, batch.mask) if self.before else before
        metrics["abs"] = float(masked_mean(reward.abs(), batch.mask))
        return Judged(reward, {f"process_reward/{name}": value for name, value in metrics.items()})

    def _reference(self, rows: TokenRows, batch: TrainBatch) -> Tensor:
        """(B, T) nats."""
        if not self.by_policy:
            return self.annotate(rows, frozenset({"ref_logp"}))["ref_logp"]
        if batch.old_logp is None:
            raise RuntimeError("the process reward model is compared with the policy that sampled, but old_logp was not computed")
        return batch.old_logp

    def _learn(self, rows: TokenRows, facts: LabelBatch, mask: Tensor, positions: Tensor, seen: Tensor) -> tuple[dict[str, float], bool]:
        """One optimizer update over the rows ``positions``, whose facts come in that order; their log-probs before it go into ``seen``."""
        whole = prepared(facts, self.objective.loss)
        totals, sums = ExampleTotals(len(positions)), dict[str, Tensor]()
        mine, lr = self._micro_batches(rows, positions, self._shares(self.policy)), self.lr
        set_mode(self.policy, training=True)
        for number, lines in enumerate(mine):
            with self.backend.micro_batch(last=number == len(mine) - 1):
                chosen, micro = self._micro_batch(rows, positions, lines)
                at = positions[chosen]
                wants = frozenset({"logp"})
                logp = self.policy(micro, temperature=self.temperature, wants=wants, chunk=self.settings.head_chunk)["logp"]
                counted = mask[at][:, : micro.width].to(self.device)
                share = self.objective(PolicySequences(masked(logp, counted).sum(1)), whole.rows(chosen).to(self.device), totals)
                self._backward(share.loss + 0.0 * logp.sum())  # without rows too, every rank joins in its peers' collectives
            for name, value in share.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
            seen[at, : micro.width] = logp.detach().float().cpu()
        found = {name.removeprefix("loss/"): value for name, value in self._reduced(sums).items()}
        found["loss"] = found.pop("preference")
        try:
            norm, stepped = self._step(found["loss"])
        except NonFiniteError as error:
            raise NonFiniteError(f"the process reward model's {error} (its settings stand in process_reward)") from error
        return found | {"grad_norm": norm, "lr": lr}, stepped


def _verdicts(batch: TrainBatch) -> Tensor:
    """(B,) 1 right, 0 wrong, NaN where nobody says."""
    counts = batch.mask.any(1) & ~batch.rewards.isnan()
    if batch.correct is None or bool(counts.any() & batch.correct[counts].isnan().all()):
        raise ValueError(
            "the process reward model learns which completions are right, but no reward function says so: add one that does to "
            "reward.functions (math_answer, with weight 0 if it must not count), or put a part named 'correct' into your own scores"
        )
    return batch.correct


def _contrast(ratio: Tensor, label: Tensor, group: Tensor, learns: Tensor) -> float:
    """How often right completions of a prompt have the larger summed log-ratio than wrong ones. 0.5 where there is nothing to compare."""
    if not bool(learns.any()):
        return 0.5
    return float(contrast_accuracy(ratio.sum(1)[learns].double(), label[learns].double(), group[learns]))
