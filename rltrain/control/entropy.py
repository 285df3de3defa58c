"""Controls that keep up the policy's entropy: STEER, the 80/20 mask, AEPO and the related DCPO.

Nothing here carries a gradient.

AEPO is arXiv:2510.08141, Arbitrary Entropy Policy Optimization (arXiv:2510.08457 and 2510.14545 use the name
for other methods).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import (
    AGGREGATE,
    ENTROPY_NOW,
    EXPECTED_ENTROPY_SLOPE,
    EXTRA_SAMPLES,
    FRACTION,
    LOGP_NOW,
    NEEDS_CORRECT,
    OLD_ENTROPY,
    OLD_LOGP,
    TEMPERED_LOGP,
    TOKEN_LEVEL,
)
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask, masked_mean, masked_quantile
from rltrain.types.policy import TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_TEMPERED

__all__ = [
    "ABOVE_TARGET",
    "aepo",
    "aepo_explicit",
    "aepo_rows",
    "aepo_temperature",
    "dcpo",
    "high_entropy_tokens",
    "steer",
    "steer_exact",
    "steer_released",
]

# note of the step: 1 if its tempered rows were sampled to lower the entropy, else 0
ABOVE_TARGET = "aepo_above_target"
_SMALLEST_P = 1e-8  # the authors' bound on probabilities


# STEER ------------------------------------------------------------------------------------------------------


@method(
    "steer",
    arxiv="2510.10150",
    needs={OLD_LOGP, LOGP_NOW},
    needs_if={
        "omega=released": {OLD_ENTROPY},
        "omega=exact": {ENTROPY_NOW, EXPECTED_ENTROPY_SLOPE.update_start},
    },
    traits={TOKEN_LEVEL, FRACTION("lambda_min")},
)
def steer(
    batch: TrainBatch,
    *,
    form: Literal["exponential", "linear"] = "exponential",
    omega: Literal["released", "exact"] = "released",
    lambda_min: float = 0.8,
    omega_floor: float = 0.02,
    w_min: float = 0.8,
    w_max: float = 1.2,
) -> TrainBatch:
    """STEER: the more a token's update would change the entropy, the smaller its weight, arXiv:2510.10150.

    Formula: exponential: ``w = lambda_min^(s / max(s_max, omega_floor))``; linear: ``w = w_max - (w_max -
    w_min) (s - s_min) / (s_max - s_min)``; ``s = |A r (1 - pi) (ln pi + H)|``

    form "exponential": within [lambda_min, 1]; a floor of 0 is the paper's form, where the largest s always
    gets lambda_min. form "linear": from w_max at s_min down to w_min at s_max, and half way between them if
    all s are equal. The extremes are those of the whole optimizer batch. omega: s is the authors' estimate
    (``steer_released``, as in the formula) or the exact first-order change (``steer_exact``). Only the
    parameters of the chosen form are read. Weights are not renormalised; pair it with the loss ``clip``
    (authors: 0.2, 0.28, dual_clip 10).
    """
    omegas = steer_released(batch) if omega == "released" else steer_exact(batch)
    strength = apply_mask(omegas.abs(), batch.mask)
    if not bool(batch.mask.any()):
        return batch

    smallest = strength[batch.mask].min()
    largest = strength[batch.mask].max()
    if form == "exponential":
        scale = largest.clamp(min=omega_floor)
        steepness = -math.log(lambda_min) / scale if float(scale) > 0 else torch.zeros_like(largest)
        factor = torch.exp(-steepness * strength).clamp(lambda_min, 1.0)
    elif bool(largest > smallest):
        factor = w_max - (strength - smallest) * (w_max - w_min) / (largest - smallest)
        factor = factor.clamp(w_min, w_max)
    else:
        factor = torch.full_like(strength, (w_min + w_max) / 2)

    return batch.replace(weights=apply_mask(batch.weights * factor, batch.mask)).with_metrics(
        steer_omega_max=float(largest), steer_weight_mean=float(masked_mean(factor, batch.mask))
    )


def steer_released(batch: TrainBatch) -> Tensor:
    """(B, T) Omega = A / pi_old * pi (1 - pi) (ln pi + H), the estimate of the authors' code; positive where
    the update lowers the entropy.

    pi is the current policy's probability of the token, H the old policy's entropy at its position. Compared
    with the exact change it lacks the effect on the other tokens and one factor pi. Probabilities are at
    least 1e-8, and pi is at most 1 - 1e-8; values that are not finite become 0.
    """
    old = _require_field(batch, "steer", batch.old_logp, "old_logp")
    entropy = _require_field(batch, "steer", batch.old_entropy, "old_entropy")
    pi = _require_field(batch, "steer", batch.logp_now, "logp_now").exp().clamp(_SMALLEST_P, 1 - _SMALLEST_P)
    return _zero_nonfinite(
        batch.advantages / old.exp().clamp(_SMALLEST_P, 1.0) * (pi * (1 - pi) * (pi.log() + entropy))
    )


def steer_exact(batch: TrainBatch) -> Tensor:
    """(B, T) Omega = A r [pi (ln pi + H) - sum_v p_v^2 (ln p_v + H)]: minus the entropy's change per unit of
    learning rate.

    Exact to first order for one softmax row after one step of gradient ascent on r A. Apart from r, all
    quantities are the current policy's.
    """
    now = _require_field(batch, "steer", batch.logp_now, "logp_now")
    old = _require_field(batch, "steer", batch.old_logp, "old_logp")
    entropy = _require_field(batch, "steer", batch.entropy_now, "entropy_now")
    name = EXPECTED_ENTROPY_SLOPE.update_start
    slope = _require_field(batch, "steer", batch.extra.get(name), name)
    return _zero_nonfinite(batch.advantages * (now - old).exp() * (now.exp() * (now + entropy) - slope))


def _zero_nonfinite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


# the 80/20 mask ---------------------------------------------------------------------------------------------


@method(
    "high_entropy_tokens", arxiv="2506.01939", needs={OLD_ENTROPY}, traits={TOKEN_LEVEL, FRACTION("share")}
)
def high_entropy_tokens(batch: TrainBatch, *, share: float = 0.2) -> TrainBatch:
    """Trains only on the ``share`` of tokens with the highest entropy, arXiv:2506.01939 ("80/20").

    Formula: weight ``1[H >= quantile_(1 - share)(H)]``

    A token is kept if its entropy is at least the (1 - share) quantile (linear between ranks, as TRL's
    ``top_entropy_quantile``) over all tokens of the step; others get weight 0 and stay in the denominator, as
    in the paper's equation. The entropies are those of the policy that sampled, which are computed together
    with its log-probs; the paper takes the quantile over a training batch.
    """
    entropy = _require_field(batch, "high_entropy_tokens", batch.old_entropy, "old_entropy")
    threshold = masked_quantile(entropy, batch.mask, 1 - share)
    kept = batch.mask & (entropy >= threshold)
    weights = torch.where(kept, batch.weights, torch.zeros_like(batch.weights))
    return batch.replace(weights=weights).with_metrics(high_entropy_tokens_threshold=float(threshold))


# AEPO -------------------------------------------------------------------------------------------------------


@method(
    "aepo",
    arxiv="2510.08141",
    needs_if={"form=explicit": {LOGP_NOW}},
    traits={AGGREGATE("token_mean"), EXTRA_SAMPLES("aepo"), NEEDS_CORRECT},
)
def aepo(
    batch: TrainBatch, *, form: Literal["explicit", "rows"] = "explicit", alpha: float = 0.024, cap: int = 60
) -> TrainBatch:
    """AEPO's REINFORCE on correct samples drawn at another temperature, arXiv:2510.08141; the extra samples
    ``aepo`` draw them.

    Formula: explicit: ``L + alpha mean(-R ln pi)``, the mean over tempered tokens and L over the others;
    rows: min(cap, k) of k tempered rows with A > 0.05 get A = 1 and replace as many GRPO rows

    form "explicit": the abstract's equation, with alpha as its coefficient (``aepo_explicit``). The paper
    does not state its value; the default is the share of 60 rows among the released form's 2,560. form
    "rows": the released code, in which at most cap tempered rows replace as many GRPO rows (``aepo_rows``);
    the step's note ``aepo_above_target``, 1 or 0, must say whether the entropy was above its target.
    """
    if form == "explicit":
        return aepo_explicit(batch, alpha=alpha)
    if ABOVE_TARGET not in batch.notes:
        raise ValueError(
            f"control aepo, form rows, needs the note {ABOVE_TARGET} (1 or 0) on the batch; its notes: "
            f"{sorted(batch.notes)}"
        )
    return aepo_rows(batch, above_target=bool(batch.notes[ABOVE_TARGET]), cap=cap)


def aepo_temperature(entropy: float, *, target: float, high: float, low: float) -> float:
    """Temperature of the next tempered rows: ``high`` if the entropy (nats) is at most ``target``, else
    ``low``.
    """
    return high if entropy <= target else low


def aepo_explicit(batch: TrainBatch, *, alpha: float) -> TrainBatch:
    """Makes the loss L over all other rows + alpha * mean over the tempered tokens of -R log pi, each divided
    by its own number of tokens.

    The gradient is exact under token_mean: with N tokens in the optimizer batch, M of them tempered, the
    others get weight N / (N - M) and the tempered ones alpha N / M. The advantage of a tempered row is R (1
    if the sample is correct, else 0) and its ``old_logp`` is the current log-prob, so that every ratio loss
    is REINFORCE on it, in later updates too. The gradient is that of the untempered log-prob. Without
    tempered rows, or without correct ones, the loss is L.
    """
    now = _require_field(batch, "aepo", batch.logp_now, "logp_now")
    right = _require_field(batch, "aepo", batch.correct, "correct")
    tempered = batch.source == SOURCE_TEMPERED
    tokens = int(batch.mask.sum())
    extra = int(batch.mask[tempered].sum())
    scale = torch.where(tempered, alpha * tokens / max(extra, 1), tokens / max(tokens - extra, 1))
    reward = (right > 0).to(batch.advantages.dtype)[:, None].expand(batch.mask.shape)
    column = tempered[:, None]
    return batch.replace(
        weights=apply_mask(batch.weights * scale.to(batch.weights.dtype)[:, None], batch.mask),
        advantages=torch.where(column, reward, batch.advantages),
        old_logp=torch.where(column, now, now if batch.old_logp is None else batch.old_logp.detach()),
    ).with_metrics(aepo_correct_rows=int((tempered & (right > 0) & batch.mask.any(dim=1)).sum()))


def aepo_rows(
    batch: TrainBatch, *, above_target: bool, cap: int, least_advantage: float = 0.05
) -> TrainBatch:
    """The released form: the first k tempered rows with an advantage above ``least_advantage`` replace the
    first k GRPO rows.

    Advantages of tempered rows are relative to their own group, so these rows are the correct ones of mixed
    groups. k is their number, at most ``cap``, and half of that (rounded down) if the entropy is above its
    target. The k rows get advantage 1; the replaced rows and all other tempered rows are masked out. Rows are
    ordered by group and sample, which is the order of sampling. If no row qualifies the step is plain GRPO
    (the release fails there).
    """
    counted = batch.mask.any(dim=1)
    tempered = counted & (batch.source == SOURCE_TEMPERED)
    eligible = tempered & (masked_mean(batch.advantages, batch.mask, dim=1) > least_advantage)
    count = min(cap, int(eligible.sum()))
    count = count // 2 if above_target else count

    order = _sampling_order(batch)
    chosen = _first_rows(eligible, order, count)
    replaced = _first_rows(counted & (batch.source == SOURCE_POLICY), order, count)
    dropped = (replaced | (batch.source == SOURCE_TEMPERED) & ~chosen)[:, None]
    return batch.replace(
        mask=batch.mask & ~dropped,
        weights=torch.where(dropped, torch.zeros_like(batch.weights), batch.weights),
        advantages=torch.where(chosen[:, None], torch.ones_like(batch.advantages), batch.advantages),
    ).with_metrics(aepo_replaced_rows=count)


def _sampling_order(batch: TrainBatch) -> Tensor:
    """(B,) positions of the rows, ordered by group and then by sample id (by position if there is none)."""
    if batch.sample is None:
        order = torch.arange(len(batch.group), device=batch.group.device)
    else:
        order = batch.sample.sort(stable=True).indices
    return order[batch.group[order].sort(stable=True).indices]


def _first_rows(eligible: Tensor, order: Tensor, count: int) -> Tensor:
    """(B,) bool: the first ``count`` eligible rows in ``order``."""
    chosen = torch.zeros_like(eligible)
    chosen[order[eligible[order]][:count]] = True
    return chosen


@method(
    "dcpo",
    arxiv="2510.08141",
    needs={OLD_LOGP, OLD_ENTROPY, TEMPERED_LOGP("{high}"), TEMPERED_LOGP("{low}")},
    traits={NEEDS_CORRECT},
)
def dcpo(
    batch: TrainBatch, *, target: float = 0.5, high: float = 1.2, low: float = 0.8, most: float = 0.1
) -> TrainBatch:
    """AEPO without a second rollout, from a branch of its authors' code (arXiv:2510.08141): the tempered
    policy's probability enters the advantage.

    Formula: ``A <- (1 - a) A + a 1[right] pi_T / pi``, ``a = b / (1 + b)``, ``b = min(|target - H|, most) /
    f``

    H is the step's mean entropy, f its share of correct samples; pi_T is the policy at temperature ``high``
    if H <= target, else ``low`` (relative to rollout.temperature). H is the entropy of this step's policy,
    where the authors' code takes the previous step's. Without a correct sample nothing changes (the authors'
    code divides by 0).
    """
    entropy = _require_field(batch, "dcpo", batch.old_entropy, "old_entropy")
    right = _require_field(batch, "dcpo", batch.correct, "correct") > 0
    counted = (batch.source == SOURCE_POLICY) & batch.mask.any(dim=1)
    level = float(masked_mean(entropy, batch.mask & counted[:, None]))
    temperature = aepo_temperature(level, target=target, high=high, low=low)
    name = f"tempered_logp:{temperature}"
    tempered = _require_field(batch, "dcpo", batch.extra.get(name), name)
    old = _require_field(batch, "dcpo", batch.old_logp, "old_logp")

    share = int((right & counted).sum()) / max(int(counted.sum()), 1)
    pull = min(abs(target - level), most) / share if share > 0 else 0.0
    mix = pull / (1 + pull)
    bonus = right[:, None] * apply_mask(tempered - old, batch.mask).exp()
    advantages = torch.where(counted[:, None], (1 - mix) * batch.advantages + mix * bonus, batch.advantages)
    return batch.replace(advantages=advantages.to(batch.advantages.dtype)).with_metrics(
        dcpo_mix=mix, dcpo_temperature=temperature
    )


def _require_field(batch: TrainBatch, control: str, value: Tensor | None, name: str) -> Tensor:
    """``value``, detached. Raises ValueError if the batch lacks it."""
    if value is None:
        raise ValueError(f"control {control} needs {name}, which the batch lacks")
    return value.detach()
