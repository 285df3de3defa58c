"""Controls that hold the policy's entropy: STEER, the 80/20 mask, AEPO and its relative DCPO. Nothing here
carries a gradient.

AEPO is arXiv:2510.08141, Arbitrary Entropy Policy Optimization (arXiv:2510.08457 and 2510.14545 use the name
for other methods).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.tensor_ops import masked, masked_mean, masked_quantile
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

# note of the step: 1 where its tempered rows were sampled to lower the entropy, else 0
ABOVE_TARGET = "aepo_above_target"
SLOPE = "expected_entropy_slope"  # statistic of the head: sum_v p_v^2 (ln p_v + H)
_SMALLEST_P = 1e-8  # the authors' bound on probabilities


# STEER ------------------------------------------------------------------------------------------------------


@method(
    "steer",
    arxiv="2510.10150",
    needs={"old_logp", "logp_now"},
    needs_if={
        "omega=released": {"old_entropy"},
        "omega=exact": {"entropy_now", "expected_entropy_slope_now"},
    },
    traits={"token_level", "fraction:lambda_min"},
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
    """STEER: a token weighs the less the more its update would move the entropy, s = |Omega|,
    arXiv:2510.10150.

    form "exponential": w = exp(-k s) with k = -ln(lambda_min) / max(s_max, omega_floor), within [lambda_min,
    1]; a floor of 0 is the paper's form, where the largest s always gets lambda_min. form "linear": from
    w_max at s_min down to w_min at s_max, and half way between them where all s are equal. The extremes are
    those of the whole optimizer batch. omega: what s is made of, the authors' estimate (``steer_released``,
    the default here too) or the exact first-order change (``steer_exact``). Only the parameters of the form
    chosen are read. Weights are not renormalised; pair with the loss ``clip`` (authors: 0.2, 0.28, dual_clip
    10).
    """
    strength = masked(
        (steer_released(batch) if omega == "released" else steer_exact(batch)).abs(), batch.mask
    )
    if not bool(batch.mask.any()):
        return batch
    least, most = strength[batch.mask].min(), strength[batch.mask].max()
    if form == "exponential":
        scale = most.clamp(min=omega_floor)
        steepness = -math.log(lambda_min) / scale if float(scale) > 0 else torch.zeros_like(most)
        factor = torch.exp(-steepness * strength).clamp(lambda_min, 1.0)
    elif bool(most > least):
        factor = (w_max - (strength - least) * (w_max - w_min) / (most - least)).clamp(w_min, w_max)
    else:
        factor = torch.full_like(strength, (w_min + w_max) / 2)
    return batch.replace(weights=masked(batch.weights * factor, batch.mask)).with_metrics(
        steer_omega_max=float(most), steer_weight_mean=float(masked_mean(factor, batch.mask))
    )


def steer_released(batch: TrainBatch) -> Tensor:
    """(B, T) Omega = A / pi_old * pi (1 - pi) (ln pi + H), of the authors' code; positive where the update
    lowers the entropy.

    pi is the current policy's probability of the token, H the old policy's entropy there. Against the exact
    change it lacks the effect on the other tokens and one factor pi. Probabilities are bounded by 1e-8, pi
    from 1 as well; not finite is 0.
    """
    old, entropy = (
        _given(batch, "steer", batch.old_logp, "old_logp"),
        _given(batch, "steer", batch.old_entropy, "old_entropy"),
    )
    pi = _given(batch, "steer", batch.logp_now, "logp_now").exp().clamp(_SMALLEST_P, 1 - _SMALLEST_P)
    return _finite(
        batch.advantages / old.exp().clamp(_SMALLEST_P, 1.0) * (pi * (1 - pi) * (pi.log() + entropy))
    )


def steer_exact(batch: TrainBatch) -> Tensor:
    """(B, T) Omega = A r [pi (ln pi + H) - sum_v p_v^2 (ln p_v + H)]: minus the entropy's change per unit of
    learning rate.

    Exact to first order for one softmax row after one step of gradient ascent on r A, all of the current
    policy.
    """
    now, old = (
        _given(batch, "steer", batch.logp_now, "logp_now"),
        _given(batch, "steer", batch.old_logp, "old_logp"),
    )
    entropy = _given(batch, "steer", batch.entropy_now, "entropy_now")
    slope = _given(batch, "steer", batch.extra.get(f"{SLOPE}_now"), f"{SLOPE}_now")
    return _finite(batch.advantages * (now - old).exp() * (now.exp() * (now + entropy) - slope))


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


# the 80/20 mask ---------------------------------------------------------------------------------------------


@method(
    "high_entropy_tokens", arxiv="2506.01939", needs={"old_entropy"}, traits={"token_level", "fraction:share"}
)
def high_entropy_tokens(batch: TrainBatch, *, share: float = 0.2) -> TrainBatch:
    """Only the ``share`` of tokens with the highest entropy is trained on, arXiv:2506.01939 ("80/20").

    A token stays where its entropy reaches the (1 - share) quantile (linear between ranks, as TRL's
    ``top_entropy_quantile``) over all tokens of the step; others get weight 0 and stay in the denominator, as
    in the paper's equation. Entropies are those of the policy that sampled, which cost nothing beside its
    log-probs; the paper takes the quantile per training batch.
    """
    entropy = _given(batch, "high_entropy_tokens", batch.old_entropy, "old_entropy")
    threshold = masked_quantile(entropy, batch.mask, 1 - share)
    kept = batch.mask & (entropy >= threshold)
    weights = torch.where(kept, batch.weights, torch.zeros_like(batch.weights))
    return batch.replace(weights=weights).with_metrics(high_entropy_tokens_threshold=float(threshold))


# AEPO -------------------------------------------------------------------------------------------------------


@method(
    "aepo",
    arxiv="2510.08141",
    needs_if={"form=explicit": {"logp_now"}},
    traits={"aggregate:token_mean", "extra_samples:aepo", "needs_correct"},
)
def aepo(
    batch: TrainBatch, *, form: Literal["explicit", "rows"] = "explicit", alpha: float = 0.024, cap: int = 60
) -> TrainBatch:
    """AEPO's REINFORCE on correct samples drawn at another temperature, arXiv:2510.08141; the source ``aepo``
    draws them.

    form "explicit": the abstract's equation, with alpha as its coefficient (``aepo_explicit``). The paper's
    value could not be found; the default is what 60 rows weigh among the released form's 2,560. form "rows":
    the released code, in which at most cap tempered rows take the place of as many GRPO rows (``aepo_rows``);
    the step must say by the note ``aepo_above_target``, 1 or 0, whether the entropy was above its target.
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
    """The temperature of the next tempered rows: ``high`` while the entropy (nats) is at most
    ``target``, else ``low``.
    """
    return high if entropy <= target else low


def aepo_explicit(batch: TrainBatch, *, alpha: float) -> TrainBatch:
    """The loss becomes L over all other rows + alpha * mean over the tempered tokens of -R log pi, each over
    its own count of tokens.

    Exact in the gradient, and under token_mean: with N tokens in the optimizer batch, of which M tempered,
    the others weigh N / (N - M), the tempered ones alpha N / M. Their advantage is R, 1 where the sample is
    correct and 0 elsewhere, and their ``old_logp`` is the current one, so that every ratio loss is REINFORCE
    on them, in later updates too. The gradient is that of the untempered log-prob. Without tempered or
    without correct rows what is left is L.
    """
    now = _given(batch, "aepo", batch.logp_now, "logp_now")
    right = _given(batch, "aepo", batch.correct, "correct")
    tempered = batch.source == SOURCE_TEMPERED
    tokens, extra = int(batch.mask.sum()), int(batch.mask[tempered].sum())
    scale = torch.where(tempered, alpha * tokens / max(extra, 1), tokens / max(tokens - extra, 1))
    reward = (right > 0).to(batch.advantages.dtype)[:, None].expand(batch.mask.shape)
    column = tempered[:, None]
    return batch.replace(
        weights=masked(batch.weights * scale.to(batch.weights.dtype)[:, None], batch.mask),
        advantages=torch.where(column, reward, batch.advantages),
        old_logp=torch.where(column, now, now if batch.old_logp is None else batch.old_logp.detach()),
    ).with_metrics(aepo_correct_rows=int((tempered & (right > 0) & batch.mask.any(dim=1)).sum()))


def aepo_rows(
    batch: TrainBatch, *, above_target: bool, cap: int, least_advantage: float = 0.05
) -> TrainBatch:
    """The released form: the first k tempered rows with an advantage above ``least_advantage`` replace the
    first k GRPO rows.

    Advantages of tempered rows are those within their own group, so the rows kept are the correct ones of
    mixed groups. k is the number kept, at most ``cap``, and half of that (rounded down) with the entropy
    above its target. Kept rows get advantage 1; the replaced and all other tempered rows are masked out.
    First: by group and sample, which is the order of sampling. Without a row to keep the step is plain GRPO
    (the release fails there).
    """
    counted = batch.mask.any(dim=1)
    tempered = counted & (batch.source == SOURCE_TEMPERED)
    good = tempered & (masked_mean(batch.advantages, batch.mask, dim=1) > least_advantage)
    kept = min(cap, int(good.sum()))
    kept = kept // 2 if above_target else kept
    order = _sampling_order(batch)
    chosen = _first_rows(good, order, kept)
    replaced = _first_rows(counted & (batch.source == SOURCE_POLICY), order, kept)
    gone = (replaced | (batch.source == SOURCE_TEMPERED) & ~chosen)[:, None]
    return batch.replace(
        mask=batch.mask & ~gone,
        weights=torch.where(gone, torch.zeros_like(batch.weights), batch.weights),
        advantages=torch.where(chosen[:, None], torch.ones_like(batch.advantages), batch.advantages),
    ).with_metrics(aepo_replaced_rows=kept)


def _sampling_order(batch: TrainBatch) -> Tensor:
    """(B,) positions of the rows by group, then by sample (where the batch has these ids, else as the
    rows stand).
    """
    by_sample = (
        torch.arange(len(batch.group), device=batch.group.device)
        if batch.sample is None
        else batch.sample.sort(stable=True).indices
    )
    return by_sample[batch.group[by_sample].sort(stable=True).indices]


def _first_rows(among: Tensor, order: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(among)
    chosen[order[among[order]][:count]] = True
    return chosen


@method(
    "dcpo",
    arxiv="2510.08141",
    needs={"old_logp", "old_entropy", "tempered_logp:{high}", "tempered_logp:{low}"},
    traits={"needs_correct"},
)
def dcpo(
    batch: TrainBatch, *, target: float = 0.5, high: float = 1.2, low: float = 0.8, most: float = 0.1
) -> TrainBatch:
    """AEPO without a second rollout, a branch of its authors' code (arXiv:2510.08141): A becomes (1 - a) A +
    a 1[correct] pi_T / pi.

    With H the step's mean entropy and f its share of correct samples, a = b / (1 + b) and b = min(|target -
    H|, most) / f; pi_T is the policy at temperature ``high`` while H <= target, else ``low`` (relative to
    rollout.temperature). H is of this step's policy, where the code takes the previous step's. Without a
    correct sample nothing changes (the code divides by 0).
    """
    entropy = _given(batch, "dcpo", batch.old_entropy, "old_entropy")
    right = _given(batch, "dcpo", batch.correct, "correct") > 0
    own = (batch.source == SOURCE_POLICY) & batch.mask.any(dim=1)
    level = float(masked_mean(entropy, batch.mask & own[:, None]))
    temperature = aepo_temperature(level, target=target, high=high, low=low)
    name = f"tempered_logp:{temperature}"
    tempered = _given(batch, "dcpo", batch.extra.get(name), name)
    share = int((right & own).sum()) / max(int(own.sum()), 1)
    pull = min(abs(target - level), most) / share if share > 0 else 0.0
    mix = pull / (1 + pull)
    bonus = (
        right[:, None]
        * masked(tempered - _given(batch, "dcpo", batch.old_logp, "old_logp"), batch.mask).exp()
    )
    advantages = torch.where(own[:, None], (1 - mix) * batch.advantages + mix * bonus, batch.advantages)
    return batch.replace(advantages=advantages.to(batch.advantages.dtype)).with_metrics(
        dcpo_mix=mix, dcpo_temperature=temperature
    )


def _given(batch: TrainBatch, control: str, value: Tensor | None, name: str) -> Tensor:
    """``value``, detached. Raises ValueError where the batch lacks it."""
    if value is None:
        raise ValueError(f"control {control} needs {name}, which the batch lacks")
    return value.detach()
