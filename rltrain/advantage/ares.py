"""ARES: rewards shaped by how many windows of high entropy a completion has, compared with a target that
depends on the prompt's difficulty, arXiv:2510.08457.

(The paper calls its scheme AEPO, a name that other papers use as well.) Easy prompts should be answered with
little exploration, hard prompts with much. A window is a run of consecutive tokens of the completion; it is
high if its mean entropy exceeds a threshold. In the released code a window belongs to the token before it, so
no window holds the first token, and a mean equal to the threshold counts as high.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import as_float, group_norm
from rltrain.needs import MASK, OLD_ENTROPY
from rltrain.registry import method
from rltrain.tensor_ops import (
    apply_mask,
    masked_quantile,
    row_quantile,
    segment_count,
    segment_mean,
    window_mean,
)

Form = Literal["released", "paper"]

__all__ = ["ares", "difficulty", "high_windows", "paper_cost", "released_term", "released_thresholds"]

EASY = 0
MEDIUM = 1
HARD = 2

# Constants of the released code, each for EASY, MEDIUM and HARD prompts.
_MARGIN = (0.15, 0.25, 0.35)  # tolerated distance from the target, as a share of it
_KAPPA = (2.0, 3.0, 4.0)  # distance at which the penalty becomes linear
_TEMPERATURE = (2.0, 2.5, 3.0)  # softness of the bonus
_CAP = (1.0, 1.0, 1.2)  # size of the bonus
_WRONG = (0.6, 0.8, 1.0)  # share of the bonus that a wrong answer can earn


@method("ares", arxiv="2510.08457", needs={MASK, OLD_ENTROPY})
def ares(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_entropy: Tensor,
    correct: Tensor | None = None,
    form: Literal["released", "paper"] = "released",
    window: int = 4,
    quantile: float = 0.95,
    threshold: float | None = None,
    targets: list[float] | None = None,
    alpha: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """ARES: GRPO's advantages (ddof 1, eps) of rewards shaped by the number N of high windows,
    arXiv:2510.08457. Returns (B,).

    Formula: ``(R' - mean) / (std + eps)`` of ``R' = R + t``. Released, with c = alpha times the difficulty's
    bonus: wrong answers ``t = share c sigmoid(max(N - target - margin, 0) / tau)``; right ones ``t = -min(c,
    size c huber(excess - margin) / (margin + kappa))``, on hard prompts with N >= target - margin ``t = c
    sigmoid((N - target + margin) / tau)``. Paper: ``t = -1[wrong] lambda g(N - target)``

    A prompt is easy if at least 2/3 of its completions are right, medium from 1/3, else hard. N counts runs
    of ``window`` tokens whose mean is above ``threshold`` (nats; paper), or runs after a token whose mean is
    at least the threshold (released). The default threshold is taken from the step: the mean over completions
    of the ``quantile`` of their token entropies (paper), or the median over completions of the quantile of
    their window means (``released_thresholds``). targets are N for easy, medium and hard prompts; the default
    is the step's mean for each difficulty, rounded in the released form.

    form "released" adds a term to right and wrong answers, at most 1.2 ``alpha`` (``released_term``). It
    omits the release's moving average of the threshold, its drift of alpha (which follows a rounding error),
    and its restriction to windows after listed words. form "paper" subtracts ``lambda g(N - target)`` from
    wrong answers, lambda = max(0, (mean N - target) / (var N + eps)); with the step's mean as target lambda
    is 0, so set ``targets``. ``correct`` says which answers are right; without it, a reward above 0 does.
    """
    rewards = as_float(rewards)
    mask = mask.bool()
    entropy = old_entropy.detach()
    counted = mask.any(1) & ~rewards.isnan()
    _check_targets(targets, form)
    right = rewards > 0 if correct is None else torch.where(correct.isnan(), rewards > 0, correct > 0)

    if threshold is None:
        threshold = _step_threshold(entropy, mask, counted, window, quantile, form)
    windows = high_windows(entropy, mask, window, threshold, form).sum(1).to(rewards.dtype)[counted]
    kind = difficulty(right[counted], group[counted])
    if targets is None:
        target = _step_targets(windows, group[counted], kind)
    else:
        target = rewards.new_tensor(targets)[kind]
    if form == "released":
        term = released_term(right[counted], kind, windows, target, alpha)
    else:
        term = _paper_term(right[counted], kind, windows, target, eps)

    shaped = torch.full_like(rewards, torch.nan)
    shaped[counted] = rewards[counted] + term
    return group_norm(shaped, group, eps=eps)


def high_windows(
    entropy: Tensor, mask: Tensor, window: int, threshold: float, form: Form = "paper"
) -> Tensor:
    """(B, W) bool: the run of ``window`` masked-in tokens is complete and its mean is above ``threshold``.

    Run w starts at the w-th masked-in token; in the released form it starts one token later, and a mean equal
    to the threshold counts.
    """
    if form == "released":
        mean, complete = window_mean(entropy, _drop_first_token(mask), window)
        return complete & (mean >= threshold)
    mean, complete = window_mean(entropy, mask, window)
    return complete & (mean > threshold)


def released_thresholds(entropy: Tensor, mask: Tensor, window: int, quantile: float) -> Tensor:
    """(B,) nats for each completion: the ``quantile`` over its tokens of the mean of the window after each.

    The last ``window`` tokens are followed by no complete window: each counts with the mean over the
    completion's windows, or with the first token's entropy if it has none. 0 for a row without tokens.
    """
    mean, complete = window_mean(entropy, _drop_first_token(mask), window)
    first = apply_mask(entropy, mask & (mask.cumsum(1) == 1)).sum(1)
    count = complete.sum(1)
    filler = torch.where(count > 0, apply_mask(mean, complete).sum(1) / count.clamp(min=1), first)
    missing = torch.arange(window, device=mask.device) < mask.sum(1, keepdim=True)
    values = torch.cat([mean, filler[:, None].expand(-1, window)], dim=1)
    return row_quantile(values, torch.cat([complete, missing], dim=1), quantile)


def _drop_first_token(mask: Tensor) -> Tensor:
    """``mask`` without the first masked-in token of each row."""
    return mask & (mask.cumsum(1) > 1)


def difficulty(right: Tensor, group: Tensor) -> Tensor:
    """(b,) EASY, MEDIUM or HARD: the share of right answers in the row's group is at least 2/3, at
    least 1/3, or less.
    """
    share = segment_mean(right.to(torch.float64), group) + 1e-9
    return torch.where(share >= 2 / 3, EASY, torch.where(share >= 1 / 3, MEDIUM, HARD))


def released_term(right: Tensor, kind: Tensor, windows: Tensor, target: Tensor, alpha: float) -> Tensor:
    """(b,) term that the released code adds to the accuracy.

    Right answers: on an easy prompt windows beyond target and margin cost, on a medium one any distance from
    the target beyond the margin costs, on a hard one more windows earn a bonus and too few cost. Wrong
    answers: the bonus grows with the windows beyond target and margin; below it is half (a sigmoid at 0).
    """

    def constant(values: tuple[float, float, float]) -> Tensor:
        return windows.new_tensor(values)[kind]

    distance = windows - target
    margin = (constant(_MARGIN) * target.clamp(min=1.0)).clamp(min=1.0)
    kappa = constant(_KAPPA)
    temperature = constant(_TEMPERATURE)
    cap = alpha * constant(_CAP)

    excess = torch.where(kind == HARD, -distance, distance)
    beyond = torch.where(kind == MEDIUM, distance.abs(), excess) - margin
    size = torch.where(kind == HARD, 0.5, 1.0).to(cap.dtype)
    penalty = -torch.minimum(cap, size * _huber(beyond, kappa) / (margin + kappa) * cap)
    bonus = torch.sigmoid((distance + margin) / temperature) * cap
    right_term = torch.where((kind == HARD) & (distance >= -margin), bonus, penalty)
    wrong_term = torch.sigmoid((distance - margin).clamp(min=0.0) / temperature) * cap * constant(_WRONG)
    return torch.where(right, right_term, wrong_term)


def _paper_term(right: Tensor, kind: Tensor, windows: Tensor, target: Tensor, eps: float) -> Tensor:
    """(b,) ``-lambda g(N - target)`` for wrong answers, 0 for right ones."""
    price = torch.relu((segment_mean(windows, kind) - target) / (_variance(windows, kind) + eps))
    return torch.where(right, torch.zeros_like(windows), -price * paper_cost(kind, windows - target))


def paper_cost(kind: Tensor, distance: Tensor) -> Tensor:
    """(b,) g: too many windows cost on an easy prompt, too few on a hard one, both on a medium one.

    distance: N minus target.
    """
    return torch.where(
        kind == EASY,
        distance.clamp(min=0.0),
        torch.where(kind == HARD, (-distance).clamp(min=0.0), distance.abs()),
    )


def _check_targets(targets: list[float] | None, form: Form) -> None:
    if form == "paper" and targets is None:
        raise ValueError(
            "ares: the paper's form needs targets: against the step's means its weight lambda is 0; set "
            "advantage.targets"
        )
    if targets is not None and len(targets) != 3:
        raise ValueError(
            f"ares: targets must be three numbers, for easy, medium and hard prompts, got {targets}"
        )


def _step_threshold(
    entropy: Tensor, mask: Tensor, counted: Tensor, window: int, quantile: float, form: Form
) -> float:
    """Threshold in nats for a high window; infinity if no completion of the step counts."""
    if not bool(counted.any()):
        return torch.inf
    if form == "paper":
        return float(row_quantile(entropy, mask, quantile)[counted].mean())
    return float(masked_quantile(released_thresholds(entropy, mask, window, quantile), counted, 0.5))


def _step_targets(windows: Tensor, group: Tensor, kind: Tensor) -> Tensor:
    """(b,) mean number of windows of a prompt, averaged over the prompts of the row's difficulty.

    Rounded (half to even) as in the released code.
    """
    per_prompt = segment_mean(windows, group)
    # Every prompt counts once, however many of its completions could be graded.
    weight = 1 / segment_count(group).to(windows.dtype)
    zeros = torch.zeros(3, dtype=windows.dtype, device=windows.device)
    total = zeros.index_add(0, kind, per_prompt * weight)
    return (total / zeros.index_add(0, kind, weight))[kind].round()


def _variance(values: Tensor, kind: Tensor) -> Tensor:
    return segment_mean((values - segment_mean(values, kind)).square(), kind)


def _huber(x: Tensor, kappa: Tensor) -> Tensor:
    x = x.clamp(min=0.0)
    return torch.where(x <= kappa, x.square() / (2 * kappa), x - kappa / 2)
