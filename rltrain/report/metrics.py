"""Computes the metrics of one step from its tensors and completions.

Names and units are in ``report/names.py``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rltrain.control.coefficient import TURN_ENTROPY
from rltrain.report.names import METRICS, Metric, check_names, metric
from rltrain.reward.score import Score
from rltrain.tensor_ops import masked_mean
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import SOURCE_NAMES, SOURCE_POLICY, Completion, ScoredGroup

__all__ = [
    "METRICS",
    "WORKER_MISMATCH",
    "Metric",
    "check_names",
    "completion_metrics",
    "metric",
    "mismatch_metrics",
    "own_step_metrics",
    "source_metrics",
    "step_metrics",
    "turn_entropies",
    "why_no_update",
    "worker_metrics",
]

WORKER_MISMATCH = "rollout/worker_mismatch/"
_NO_NAME = re.compile(r"[^A-Za-z0-9.:]+")  # what a metric's name has a dash for, as in an url
_MAX_LOG_RATIO = 20.0  # e^20: a larger ratio says no more than that engine and learner disagree


def own_step_metrics(batch: TrainBatch, logp: Tensor, entropy: Tensor, sampled: Tensor) -> dict[str, float]:
    """``step_metrics`` over the policy's own rows, because rows of other sources are not its samples.

    ``learner/tokens`` counts all rows.
    """
    if not bool((batch.source != SOURCE_POLICY).any()):
        return step_metrics(batch, logp, entropy, sampled)
    own_rows = torch.nonzero(batch.source == SOURCE_POLICY).flatten()
    metrics = step_metrics(batch.rows(own_rows), logp[own_rows], entropy[own_rows], sampled[own_rows])
    return metrics | {"learner/tokens": float(batch.mask.sum())}


def step_metrics(
    batch: TrainBatch, logp: Tensor, entropy: Tensor, sampled: Tensor | None = None
) -> dict[str, float]:
    """Rewards, advantages, entropy, covariance and engine/learner mismatch of a whole step (all ranks).

    logp, entropy: (B, T) nats, by the learner, of the policy that sampled. sampled: (B, T) bool, the tokens
    that the policy wrote before any control masked some, so that a control cannot hide what it dropped; None:
    ``batch.mask``. Mismatch is absent when the batch has no ``rollout_logp``. All numbers leave the device in
    one transfer.
    """
    sampled = batch.mask if sampled is None else sampled
    values = {
        **_reward_statistics(batch.rewards, batch.group),
        **_advantage_statistics(batch, logp),
        **_entropy_statistics(entropy, sampled),
        "control/masked": 1 - _share(batch.mask & (batch.weights != 0), sampled),
        "learner/tokens": batch.mask.sum(),
    }
    if batch.rollout_logp is not None:
        values |= _mismatch(logp - batch.rollout_logp, sampled)
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def mismatch_metrics(logp: Tensor, rollout_logp: Tensor, sampled: Tensor) -> dict[str, float]:
    """Engine/learner mismatch of some rows. logp, rollout_logp: (B, T) nats, by learner and engine.
    sampled: (B, T) bool, the tokens that count.
    """
    return {name: float(value) for name, value in _mismatch(logp - rollout_logp, sampled).items()}


def staleness_metrics(sampled: TrainBatch, logp: Tensor, version: int) -> dict[str, float]:
    """How old the policy's own samples are, and what their ratios come to at each age.

    logp: (B, T) nats, by the learner at ``version``. Ages are in versions.
    """
    tokens = sampled.mask & (sampled.source == SOURCE_POLICY)[:, None]
    if not bool(tokens.any()):
        return {}
    ages = version - sampled.version
    values = ages[tokens].double()
    oldest = (version - sampled.oldest)[tokens.any(dim=1)].double()
    metrics = {
        "staleness/mean": float(values.mean()),
        "staleness/max": float(values.max()),
        "staleness/oldest": float(oldest.mean()),
    }
    if sampled.rollout_logp is not None:
        log_ratio = (logp - sampled.rollout_logp).double().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        for age in values.unique().tolist():
            mass = log_ratio[tokens & (ages == age)].exp().mean()
            metrics[f"staleness/ratio_mass@{age:g}"] = float(mass)
    return metrics


def worker_metrics(
    workers: Mapping[str, Sequence[int]], logp: Tensor, rollout_logp: Tensor, sampled: Tensor
) -> dict[str, float]:
    """The mean |learner - engine log-prob| of each worker's rows, given by its name. logp, rollout_logp,
    sampled: as in ``mismatch_metrics``.
    """
    metrics: dict[str, float] = {}
    for worker, rows in workers.items():
        values = (logp - rollout_logp)[rows][sampled[rows]].double().abs()
        if len(values):
            metrics[WORKER_MISMATCH + _NO_NAME.sub("-", worker)] = float(values.mean())
    return metrics


def completion_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Lengths, finish reasons, reasons for missing scores, and means of the reward's parts, over the
    policy's own completions.
    """
    pairs = _pairs(groups, SOURCE_POLICY)
    lengths = [len(completion.token_ids) for completion, _ in pairs]
    finish = Counter(completion.finish for completion, _ in pairs)
    graded = [score for _, score in pairs if score.ungraded is None]
    parts: dict[str, list[float]] = {}
    for score in graded:
        for name, value in score.parts.items():
            parts.setdefault(name, []).append(value)
    verdicts = [bool(score.correct) for score in graded if score.correct is not None]
    reasons = Counter(score.ungraded.partition(":")[0] for _, score in pairs if score.ungraded is not None)
    return {
        "rollout/completions": float(len(pairs)),
        "rollout/tokens": float(sum(completion.sampled_tokens for completion, _ in pairs)),
        "rollout/length_mean": _mean(lengths),
        "rollout/length_max": float(max(lengths, default=0)),
        "rollout/finished_by_length": finish["length"] / max(len(pairs), 1),
        "rollout/aborted": finish["aborted"] / max(len(pairs), 1),
        **_truncation_metrics([completion for completion, _ in pairs]),
        **({"reward/correct": _mean(verdicts)} if verdicts else {}),
        **{f"reward/part/{name}": _mean(values) for name, values in parts.items()},
        **{f"reward/ungraded/{reason}": float(count) for reason, count in reasons.items()},
        **_episode_metrics([completion for completion, _ in pairs if completion.episode is not None]),
    }


def _truncation_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Probability that truncated sampling dropped; empty where it dropped none."""
    masses = [mass for completion in completions if completion.kept for mass in completion.kept.mass]
    return {"rollout/mass_cut": 1 - _mean(masses)} if masses else {}


def _episode_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """What happened in the environment; empty if the completions are not episodes."""
    if not completions:
        return {}
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    parts: dict[str, list[float]] = {}
    for episode in episodes:
        if episode.failure is None:
            for name, value in episode.parts.items():
                parts.setdefault(name, []).append(value)
    return {
        "rollout/turns_mean": _mean([len(episode.turns) for episode in episodes]),
        "rollout/turns_max": float(max(len(episode.turns) for episode in episodes)),
        "rollout/observed_mean": _mean(
            [len(completion.token_ids) - completion.sampled_tokens for completion in completions]
        ),
        "rollout/environment_failures": float(sum(episode.failure is not None for episode in episodes)),
        **{f"rollout/environment/{name}": _mean(values) for name, values in parts.items()},
    }


def source_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """How many rows the other sources added, and their scores."""
    metrics: dict[str, float] = {}
    present = {completion.source for group in groups for completion in group.completions} - {SOURCE_POLICY}
    for source in sorted(present):
        pairs = _pairs(groups, source)
        name = f"rollout/source_{SOURCE_NAMES.get(source, source)}"
        graded = [score for _, score in pairs if score.ungraded is None]
        metrics |= {
            f"{name}_completions": float(len(pairs)),
            f"{name}_tokens": float(sum(len(completion.token_ids) for completion, _ in pairs)),
            f"{name}_reward": _mean([score.value for score in graded]),
        }
        verdicts = [bool(score.correct) for score in graded if score.correct is not None]
        metrics |= {f"{name}_correct": _mean(verdicts)} if verdicts else {}
    return metrics


def _pairs(groups: Sequence[ScoredGroup], source: int) -> list[tuple[Completion, Score]]:
    """Every completion of one source with its score."""
    pairs = (pair for group in groups for pair in zip(group.completions, group.scores, strict=True))
    return [(completion, score) for completion, score in pairs if completion.source == source]


def why_no_update(batch: TrainBatch, lr: float) -> str | None:
    """Why the policy loss of this step cannot change the weights; None when it can.

    The gradient is zero when no token counts or every advantage is 0; the update is zero when the learning
    rate is 0. Additive terms (KL, entropy) can still contribute, so call this only when the measured gradient
    is zero.
    """
    counted = batch.mask & (batch.weights != 0)
    low, high = _group_range(batch.rewards, batch.group, counted.any(dim=1))
    facts = torch.stack(
        [
            batch.mask.any(),
            counted.any(),
            (batch.advantages != 0).logical_and(counted).any(),
            (high > low).any(),
        ]
    )
    any_masked_in, any_weighted, any_advantage, any_useful = facts.tolist()
    if not any_masked_in:
        return "all masked (no completion counts)"
    if not any_weighted:
        return "all masked (a control gave every token weight 0)"
    if not any_advantage and not any_useful:
        return "all groups equal (same reward within each group)"
    if not any_advantage:
        return "all advantages 0 (although rewards differ within groups)"
    return "lr 0" if lr == 0 else None


def _reward_statistics(rewards: Tensor, group: Tensor) -> dict[str, Tensor]:
    """rewards: (B,), NaN for a completion without one. Without any reward the statistics are NaN."""
    graded = ~rewards.isnan()
    low, high = _group_range(rewards, group, graded)
    any_graded = graded.any()
    nan = torch.full((), math.nan, device=rewards.device)
    mean = masked_mean(rewards, graded)
    return {
        "reward/mean": torch.where(any_graded, mean, nan),
        "reward/std": torch.where(any_graded, masked_mean((rewards - mean).square(), graded).sqrt(), nan),
        "reward/min": torch.where(any_graded, torch.where(graded, rewards, math.inf).min(), nan),
        "reward/max": torch.where(any_graded, torch.where(graded, rewards, -math.inf).max(), nan),
        "reward/useful_groups": (high > low).double().mean(),
        "reward/graded": graded.double().mean(),
    }


def _group_range(rewards: Tensor, group: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest reward of each group over ``rows`` (B,) bool; (inf, -inf) for a group
    without such a row.
    """
    ids, inverse = torch.unique(group, return_inverse=True)
    low = torch.full((len(ids),), math.inf, dtype=rewards.dtype, device=rewards.device)
    kept = rows & ~rewards.isnan()
    highest = (-low).scatter_reduce(0, inverse, torch.where(kept, rewards, -math.inf), "amax")
    return low.scatter_reduce(0, inverse, torch.where(kept, rewards, math.inf), "amin"), highest


def _advantage_statistics(batch: TrainBatch, logp: Tensor) -> dict[str, Tensor]:
    mean = masked_mean(batch.advantages, batch.mask)
    return {
        "advantage/mean": mean,
        "advantage/abs": masked_mean(batch.advantages.abs(), batch.mask),
        "advantage/logp_covariance": masked_mean(
            (logp - masked_mean(logp, batch.mask)) * (batch.advantages - mean), batch.mask
        ),
    }


def _entropy_statistics(entropy: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    values = entropy[sampled]
    low, high = _quantiles(values, 0.1, 0.9)
    return {
        "learner/entropy_mean": values.sum() / max(len(values), 1),
        "learner/entropy_p10": low,
        "learner/entropy_p90": high,
    }


def turn_entropies(batch: TrainBatch, entropy: Tensor) -> dict[str, float]:
    """The mean entropy of each turn of the step's episodes, over the tokens that all of them have in it.

    entropy: (B, T) nats. Empty where no completion has turns.
    """
    if batch.step_id is None:
        return {}
    inside = batch.step_id >= 0
    turn = batch.step_id[inside]
    counts = torch.bincount(turn)
    sums = entropy.new_zeros(len(counts)).index_add(0, turn, entropy[inside])
    means = (sums / counts).tolist()  # a turn that no episode reached before a longer one's is NaN
    return {f"{TURN_ENTROPY}{number}": mean for number, mean in enumerate(means)}


def _mismatch(log_ratio: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    """log_ratio: (B, T) nats, learner minus engine. Its exponential weighs the engine's tokens by the
    learner's probability.
    """
    values = log_ratio[sampled].double()
    ratio = values.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    count = max(len(values), 1)
    median, p99, largest = _quantiles(ratio, 0.5, 0.99, 1.0)
    return {
        "rollout/mismatch_abs": values.abs().sum() / count,
        "rollout/mismatch_max": values.abs().max() if len(values) else values.sum(),
        "rollout/mismatch_k3": (ratio - 1 - values).sum() / count,
        "rollout/ratio_p50": median,
        "rollout/ratio_p99": p99,
        "rollout/ratio_max": largest,
        "rollout/ess": ratio.sum().square() / (count * ratio.square().sum()),
        "rollout/ratio_mean": ratio.sum() / count,
        "rollout/ess_completions": _completion_ess(log_ratio, sampled),
    }


def _completion_ess(log_ratio: Tensor, sampled: Tensor) -> Tensor:
    """Effective sample size of the ratios of whole completions, as a share of them; NaN without any."""
    sums = torch.where(sampled, log_ratio.double(), 0.0).sum(dim=1)[sampled.any(dim=1)]
    if len(sums) == 0:
        return sums.sum() / 0.0
    ratio = (sums - sums.max()).exp()  # a common factor cancels
    return ratio.sum().square() / (len(ratio) * ratio.square().sum())


def _quantiles(values: Tensor, *shares: float) -> list[Tensor]:
    """Linearly interpolated quantiles of ``values`` (n,), sorted once; NaN if ``values`` is empty."""
    if len(values) == 0:
        return [torch.full((), math.nan, device=values.device)] * len(shares)
    sorted_values = values.sort().values
    last = len(values) - 1
    quantiles = []
    for share in shares:
        position = share * last
        index = int(position)
        low = sorted_values[index]
        high = sorted_values[min(index + 1, last)]
        quantiles.append(torch.lerp(low, high, position - index))
    return quantiles


def _share(subset: Tensor, mask: Tensor) -> Tensor:
    """Share of ``mask`` that is in ``subset``; 1 for an empty mask, which has lost nothing."""
    count = mask.sum()
    return torch.where(count > 0, (subset & mask).sum() / count.clamp(min=1), 1.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
