"""HAPO's entropy signal, which separates certain from uncertain tokens for its loss and its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import ENTROPY_NOW, POLICY_LOSS
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import TrainBatch

__all__ = ["EntropySignal", "adaptive_temperature", "entropy_signal", "hapo"]

Form = Literal["intended", "released"]
ENTROPY_FLOOR = 1e-8  # nats, before the logarithm
SCALE_FLOOR = 1e-8


@dataclass(frozen=True)
class EntropySignal:
    """Four numbers of an optimizer batch that determine the signal of any token.

    They can be stored as JSON for the next step's sampler.
    """

    pivot: float  # rho-quantile of ln H
    sigma: float  # root mean square of ln H - pivot
    top: float  # largest h = (ln H - pivot) / sigma, at least 1e-8
    bottom: float  # smallest h, at most -1e-8

    def deviation(self, entropy: Tensor) -> Tensor:
        """h, in standard deviations from the pivot, with the shape of ``entropy`` (nats)."""
        return (entropy.clamp(min=ENTROPY_FLOOR).log() - self.pivot) / self.sigma

    def scaled_deviation(self, entropy: Tensor, form: Form = "intended") -> Tensor:
        """h_hat, in [-1, 1] for tokens of the batch on which the signal was measured.

        With form "released" the sign of the lower half is lost.
        """
        h = self.deviation(entropy)
        bottom = self.bottom if form == "released" else -self.bottom
        return torch.where(h > 0, h / self.top, h / bottom)


@method("hapo", arxiv="2509.16591", needs={ENTROPY_NOW}, traits={POLICY_LOSS("hapo")})
def hapo(
    batch: TrainBatch, *, rho: float = 0.8, form: Literal["intended", "released"] = "intended"
) -> TrainBatch:
    """HAPO's signal h_hat in [-1, 1] for the loss ``hapo``: above 0 for uncertain tokens, below for certain
    ones, arXiv:2509.16591.

    Formula: ``h_hat = h / max h`` if h > 0, else ``h / |min h|``; ``h = (ln H - Q_rho(ln H)) / sigma``

    Q_rho is the rho-quantile (the nearest token's value) over the whole optimizer batch, sigma the root mean
    square of what is left, H the entropy of the policy at the start of the update. form "released" divides by
    min h itself, so that h_hat is never negative and very certain tokens count as very uncertain ones
    (equations 8 to 13 of the paper need the sign); the released code takes its statistics from a micro-batch.
    Logs hapo_pivot, hapo_sigma, hapo_top and hapo_bottom, which the adaptive temperature of the next step's
    sampler uses. Equal entropies give h_hat 0 everywhere.
    """
    if batch.entropy_now is None:
        raise ValueError(
            "control hapo needs entropy_now, which the batch lacks: the learner did not compute it"
        )
    signal = entropy_signal(batch.entropy_now, batch.mask, rho)
    if signal is None:
        return batch.with_extra(h_hat=torch.zeros_like(batch.entropy_now))
    h_hat = apply_mask(signal.scaled_deviation(batch.entropy_now.detach(), form), batch.mask)
    notes = {
        "hapo_pivot": signal.pivot,
        "hapo_sigma": signal.sigma,
        "hapo_top": signal.top,
        "hapo_bottom": signal.bottom,
    }
    return batch.with_extra(h_hat=h_hat).with_metrics(**notes)


def entropy_signal(entropy: Tensor, mask: Tensor, rho: float = 0.8) -> EntropySignal | None:
    """Signal of all masked-in tokens of ``entropy (B, T)`` in nats; None if there are none."""
    logs = entropy.detach()[mask.bool()].clamp(min=ENTROPY_FLOOR).log()
    if logs.numel() == 0:
        return None
    place = round(rho * (logs.numel() - 1))
    pivot = logs.sort().values[place]
    sigma = (logs - pivot).square().mean().clamp(min=SCALE_FLOOR).sqrt()
    h = (logs - pivot) / sigma
    return EntropySignal(
        float(pivot), float(sigma), max(float(h.max()), SCALE_FLOOR), min(float(h.min()), -SCALE_FLOOR)
    )


def adaptive_temperature(
    entropy: Tensor,
    signal: EntropySignal | None,
    base: float,
    tau: float,
    variant: Literal["scaled", "released", "unscaled"] = "scaled",
) -> Tensor:
    """Temperature for the next token, from the entropy (nats) of its distribution at ``base`` and the last
    step's signal, arXiv:2509.16591.

    "scaled": ``base (1 + tau h_hat)`` with h_hat clamped to [-1, 1] (new tokens can lie beyond the last
    step's), hotter where the policy is uncertain. "released": with the release's sign, hotter at both ends.
    "unscaled": with h itself, unbounded, as in the paper's second version. Without a signal (the first step)
    it is base. The authors' code uses tau 0.05, the paper 0.1.
    """
    if signal is None:
        return torch.full_like(entropy, base)
    if variant == "unscaled":
        return base * (1 + tau * signal.deviation(entropy))
    form: Form = "released" if variant == "released" else "intended"
    return base * (1 + tau * signal.scaled_deviation(entropy, form).clamp(-1.0, 1.0))
