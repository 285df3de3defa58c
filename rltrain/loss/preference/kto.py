"""KTO: learning from single completions that are labelled desirable or undesirable."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.loss.preference.ratio import completion_log_ratio
from rltrain.loss.preference.statistics import labels, statistic
from rltrain.needs import DESIRABLE_SHARE, LABEL, LABELS, REF_LOGP, Z0
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, LabelBatch, PolicySequences

__all__ = ["class_weight_advice", "class_weight_window", "kto", "mismatched_partner"]


@method("kto", arxiv="2402.01306", needs={REF_LOGP, LABEL, Z0, DESIRABLE_SHARE}, traits={LABELS})
def kto(
    policy: PolicySequences,
    batch: LabelBatch,
    *,
    beta: float = 0.1,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
) -> ExampleLoss:
    """KTO: a saturating value of the log-ratio, above its mean for desirable completions and below for
    others, arXiv:2402.01306. Values (N,).

    Formula: ``weight sigmoid(-+beta (u - z0))``, - for desirable completions

    z0 is one number for the optimizer batch over all ranks, without gradient (``statistics.z0``). beta: how
    fast the value saturates around z0. weight_desirable and weight_undesirable balance the classes
    (``class_weight_window``). There is no logarithm: examples far from z0 on either side have almost no
    gradient. Rewards are logged as means over their class.
    """
    desirable = labels(batch, "kto") > 0.5
    reference_point = statistic(batch, "z0", "kto")
    log_ratio = completion_log_ratio(policy, batch.completion)
    gain = beta * (log_ratio - reference_point)
    weight = torch.where(desirable, weight_desirable, weight_undesirable).to(gain.dtype)
    values = weight * torch.sigmoid(torch.where(desirable, -gain, gain))
    with torch.no_grad():
        share = statistic(batch, "desirable_share", "kto").to(gain.dtype)
        per_desirable = torch.where(desirable, 1 / share.clamp(min=1e-9), 0.0)
        per_undesirable = torch.where(desirable, 0.0, 1 / (1 - share).clamp(min=1e-9))
        reward = beta * log_ratio.detach()
        z0 = torch.ones_like(gain) * reference_point
        metrics = {
            "reward_desirable": reward * per_desirable,
            "reward_undesirable": reward * per_undesirable,
            "z0": z0,
        }
    return ExampleLoss(values, metrics)


def mismatched_partner(prompt: Tensor, seed: int) -> Tensor:
    """(N,) int64 row whose completion is paired with prompt i for z0: a seeded permutation of the optimizer
    batch.

    No row gets a completion of its own prompt, and every completion is used once: shuffled prompts, each with
    its rows shuffled, form a ring that is shifted by the size of the largest prompt group, and so past every
    group. Raises ValueError if one prompt has more than half of the rows: then no such pairing exists.
    """
    rows = prompt.shape[0]
    generator = torch.Generator().manual_seed(seed)
    prompts, index, counts = torch.unique(prompt.cpu(), return_inverse=True, return_counts=True)
    shuffled = torch.randperm(rows, generator=generator)
    place = torch.randperm(len(prompts), generator=generator)  # of each prompt among the prompts
    order = shuffled[torch.argsort(place[index][shuffled], stable=True)]
    largest = int(counts.max()) if rows else 0
    if 2 * largest > rows:
        raise ValueError(
            f"kto: {largest} of the {rows} completions of an optimizer batch answer one prompt, so they "
            "cannot all be paired with another prompt's completion; raise the batch size or shuffle the data "
            "by row"
        )
    partner = torch.empty(rows, dtype=torch.int64)
    partner[order] = order.roll(-largest)
    return partner.to(prompt.device)


def class_weight_window(desirable: int, undesirable: int) -> tuple[float, float]:
    """(low, high) for weight_desirable / weight_undesirable: ``ratio * desirable / undesirable`` in [1, 3/2],
    arXiv:2402.01306.

    desirable, undesirable: completions of each class in the data set, both at least 1. An older version of
    the paper, and TRL, put the upper end at 4/3.
    """
    if desirable < 1 or undesirable < 1:
        raise ValueError(
            f"kto: {desirable} desirable and {undesirable} undesirable completions; it needs at least 1 of "
            "each"
        )
    return undesirable / desirable, 1.5 * undesirable / desirable


def class_weight_advice(
    desirable: int, undesirable: int, weight_desirable: float, weight_undesirable: float
) -> str | None:
    """Weights for the recipe, with the larger class at 1, if its weights lie outside the paper's window; else
    None.
    """
    low, high = class_weight_window(desirable, undesirable)
    ratio = weight_desirable / weight_undesirable
    if low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9):
        return None
    larger_undesirable = undesirable >= desirable
    name = "weight_desirable" if larger_undesirable else "weight_undesirable"
    start, end = (low, high) if larger_undesirable else (1 / high, 1 / low)
    return (
        f"kto: {desirable} desirable and {undesirable} undesirable completions with weights "
        f"{weight_desirable} and {weight_undesirable}: their weighted ratio is "
        f"{ratio * desirable / undesirable:.3g}, outside [1, 1.5]; set {name} between {start:.4g} and "
        f"{end:.4g} and the other to 1"
    )
