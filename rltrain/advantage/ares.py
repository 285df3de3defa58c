"""ARES: how many stretches of high entropy a completion has, against what its prompt's difficulty calls for,
arXiv:2510.08457.

(The paper calls its scheme AEPO; so do others theirs.) Easy prompts shall be answered with little
exploration, hard ones with much. A window is a run of consecutive tokens of the completion; it is high if its
mean entropy exceeds a threshold. In the release it belongs to the token before it, so that no window holds
the first token, and reaching the threshold is enough.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.advantage.group import as_float, group_norm
from rltrain.registry import method
from rltrain.tensor_ops import masked, masked_quantile, row_quantile, segment_count, segment_mean, window_mean

Form = Literal["released", "paper"]

__all__ = ["ares", "difficulty", "high_windows", "paper_cost", "released_term", "released_thresholds"]

EASY, MEDIUM, HARD = 0, 1, 2

# of the release, by difficulty: share of the target that is tolerated, where the penalty turns linear,
# softness of the bonus, its size
_MARGIN, _KAPPA, _TEMPERATURE, _CAP = (0.15, 0.25, 0.35), (2.0, 3.0, 4.0), (2.0, 2.5, 3.0), (1.0, 1.0, 1.2)
_WRONG = (0.6, 0.8, 1.0)  # share of the bonus that a wrong answer can earn


@method("ares", arxiv="2510.08457", needs={"mask", "old_entropy"})
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

    A prompt is easy where at least 2/3 of its completions are right, medium from 1/3, else hard. N counts
    runs of ``window`` tokens whose mean is above ``threshold`` (nats; paper), or runs behind a token whose
    mean is at least that (released). By default it is the step's: the mean over completions of the
    ``quantile`` of their token entropies (paper), or the median of the quantile of their window means
    (released), in which the last ``window`` tokens, behind which no whole window is left, count with the mean
    of those before them, and a completion without any window with its first token's entropy. targets are N
    for easy, medium and hard prompts, by default the step's own mean of each kind, rounded in the released
    form.

    form "released" adds a term to right and wrong answers, at most 1.2 ``alpha`` (``released_term``). Left
    out of it: the moving average of the threshold, the drift of alpha (which follows a rounding error), and
    the list of words after which alone windows are counted. "paper": subtracts ``lambda g(N - target)`` from
    wrong answers, lambda = max(0, (mean N - target) / (var N + eps)); with the step's own mean as target
    lambda is 0, so give ``targets``. Right is what ``correct`` says, else a reward above 0.
    """
    rewards = as_float(rewards)
    counted = mask.bool().any(1) & ~rewards.isnan()
    if form == "paper" and targets is None:
        raise ValueError(
            "ares: the paper's form needs targets: against the step's own means its weight lambda is 0; set "
            "advantage.targets"
        )
    if targets is not None and len(targets) != 3:
        raise ValueError(
            f"ares: targets must be three numbers, of easy, medium and hard prompts; got {targets}"
        )
    right = rewards > 0 if correct is None else torch.where(correct.isnan(), rewards > 0, correct > 0)
    if threshold is None:
        threshold = _threshold(old_entropy.detach(), mask.bool(), counted, window, quantile, form)
    windows = (
        high_windows(old_entropy.detach(), mask.bool(), window, threshold, form).sum(1).to(rewards.dtype)
    )
    kind, found = difficulty(right[counted], group[counted]), windows[counted]
    target = (
        _own_targets(found, group[counted], kind) if targets is None else rewards.new_tensor(targets)[kind]
    )
    if form == "released":
        term = released_term(right[counted], kind, found, target, alpha)
    else:
        price = torch.relu((segment_mean(found, kind) - target) / (_variance(found, kind) + eps))
        term = torch.where(right[counted], torch.zeros_like(found), -price * paper_cost(kind, found - target))
    shaped = torch.full_like(rewards, torch.nan)
    shaped[counted] = rewards[counted] + term
    return group_norm(shaped, group, eps=eps)


def high_windows(
    entropy: Tensor, mask: Tensor, window: int, threshold: float, form: Form = "paper"
) -> Tensor:
    """(B, W) bool: the run of ``window`` masked-in tokens is complete and its mean above ``threshold``.

    Run w starts at the w-th masked-in token; in the released form at the one behind it, and a mean equal to
    the threshold counts.
    """
    if form == "released":
        mean, whole = window_mean(entropy, _behind_the_first(mask), window)
        return whole & (mean >= threshold)
    mean, whole = window_mean(entropy, mask, window)
    return whole & (mean > threshold)


def released_thresholds(entropy: Tensor, mask: Tensor, window: int, quantile: float) -> Tensor:
    """(B,) nats, of each completion: the ``quantile`` over its tokens of the mean of the window behind each.

    A token behind which no whole window is left has the mean of the windows there are, and the first token's
    entropy where there is none. 0 for a row without tokens.
    """
    mean, whole = window_mean(entropy, _behind_the_first(mask), window)
    first = masked(entropy, mask & (mask.cumsum(1) == 1)).sum(1)
    count = whole.sum(1)
    filler = torch.where(count > 0, masked(mean, whole).sum(1) / count.clamp(min=1), first)
    missing = torch.arange(window, device=mask.device) < mask.sum(1, keepdim=True)
    values = torch.cat([mean, filler[:, None].expand(-1, window)], dim=1)
    return row_quantile(values, torch.cat([whole, missing], dim=1), quantile)


def _behind_the_first(mask: Tensor) -> Tensor:
    """``mask`` without the first masked-in token of each row."""
    return mask & (mask.cumsum(1) > 1)


def difficulty(right: Tensor, group: Tensor) -> Tensor:
    """(b,) EASY, MEDIUM or HARD: the share of right answers in the row's group is at least 2/3, at
    least 1/3, or less.
    """
    share = segment_mean(right.to(torch.float64), group) + 1e-9
    return torch.where(share >= 2 / 3, EASY, torch.where(share >= 1 / 3, MEDIUM, HARD))


def released_term(right: Tensor, kind: Tensor, windows: Tensor, target: Tensor, alpha: float) -> Tensor:
    """(b,) what the release adds to the accuracy. Right: easy loses for windows beyond target and margin,
    medium for any distance from it, hard gains with their number and loses for too few. Wrong: all gain with
    the number beyond target and margin, and half of their bonus without (a sigmoid at 0)."""

    def of_kind(values: tuple[float, float, float]) -> Tensor:
        return windows.new_tensor(values)[kind]

    distance = windows - target
    margin = (of_kind(_MARGIN) * target.clamp(min=1.0)).clamp(min=1.0)
    kappa, temperature, cap = of_kind(_KAPPA), of_kind(_TEMPERATURE), alpha * of_kind(_CAP)
    beyond = (
        torch.where(kind == MEDIUM, distance.abs(), torch.where(kind == HARD, -distance, distance)) - margin
    )
    size = torch.where(kind == HARD, 0.5, 1.0).to(cap.dtype)
    penalty = -torch.minimum(cap, size * _huber(beyond, kappa) / (margin + kappa) * cap)
    bonus = torch.sigmoid((distance + margin) / temperature) * cap
    of_right = torch.where((kind == HARD) & (distance >= -margin), bonus, penalty)
    of_wrong = torch.sigmoid((distance - margin).clamp(min=0.0) / temperature) * cap * of_kind(_WRONG)
    return torch.where(right, of_right, of_wrong)


def paper_cost(kind: Tensor, distance: Tensor) -> Tensor:
    """(b,) g: too many windows cost an easy prompt, too few a hard one, both a medium one. distance:
    N less target.
    """
    return torch.where(
        kind == EASY,
        distance.clamp(min=0.0),
        torch.where(kind == HARD, (-distance).clamp(min=0.0), distance.abs()),
    )


def _threshold(
    entropy: Tensor, mask: Tensor, counted: Tensor, window: int, quantile: float, form: Form
) -> float:
    """Nats, from which a window is high; infinity where the step has no completion to take it from."""
    if not bool(counted.any()):
        return torch.inf
    if form == "paper":
        return float(row_quantile(entropy, mask, quantile)[counted].mean())
    return float(masked_quantile(released_thresholds(entropy, mask, window, quantile), counted, 0.5))


def _own_targets(windows: Tensor, group: Tensor, kind: Tensor) -> Tensor:
    """(b,) mean over the prompts of the row's kind of their mean number of windows, rounded (half to
    even) as released.
    """
    per_prompt = segment_mean(windows, group)
    weight = 1 / segment_count(group).to(
        windows.dtype
    )  # every prompt counts once, however many of its completions could be graded
    total = torch.zeros(3, dtype=windows.dtype, device=windows.device)
    return (total.index_add(0, kind, per_prompt * weight) / total.index_add(0, kind, weight))[kind].round()


def _variance(values: Tensor, kind: Tensor) -> Tensor:
    return segment_mean((values - segment_mean(values, kind)).square(), kind)


def _huber(x: Tensor, kappa: Tensor) -> Tensor:
    x = x.clamp(min=0.0)
    return torch.where(x <= kappa, x.square() / (2 * kappa), x - kappa / 2)
