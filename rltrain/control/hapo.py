"""HAPO's entropy signal: what tells certain tokens from uncertain ones, for its loss and for its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rltrain.registry import method
from rltrain.tensor_ops import masked
from rltrain.types.policy import TrainBatch

__all__ = ["EntropySignal", "adaptive_temperature", "entropy_signal", "hapo"]

Form = Literal["intended", "released"]
ENTROPY_FLOOR = 1e-8  # nats, before the logarithm
SCALE_FLOOR = 1e-8


@dataclass(frozen=True)
class EntropySignal:
    """Four numbers of an optimizer batch, from which any token's signal follows.

    JSON-ready, for the next step's sampler.
    """

    pivot: float  # rho-quantile of ln H
    sigma: float  # root mean square of ln H - pivot
    top: float  # largest h = (ln H - pivot) / sigma, at least 1e-8
    bottom: float  # smallest h, at most -1e-8

    def unscaled(self, entropy: Tensor) -> Tensor:
        """h, in standard deviations around the pivot; the shape of ``entropy`` (nats)."""
        return (entropy.clamp(min=ENTROPY_FLOOR).log() - self.pivot) / self.sigma

    def scaled(self, entropy: Tensor, form: Form = "intended") -> Tensor:
        """h_hat in [-1, 1] for tokens of the batch it was measured on.

        Released: the sign of the lower half is lost.
        """
        h = self.unscaled(entropy)
        return torch.where(h > 0, h / self.top, h / (self.bottom if form == "released" else -self.bottom))


@method("hapo", arxiv="2509.16591", needs={"entropy_now"}, traits={"policy_loss:hapo"})
def hapo(
    batch: TrainBatch, *, rho: float = 0.8, form: Literal["intended", "released"] = "intended"
) -> TrainBatch:
    """HAPO's signal h_hat in [-1, 1] for the loss ``hapo``: above 0 the uncertain tokens, below the certain
    ones, arXiv:2509.16591.

    h = (ln H - Q) / sigma with Q the rho-quantile (the nearest token's value) over the whole optimizer batch
    and H the entropy of the policy as it is at the start of the update; then divided by max h above 0 and by
    |min h| below. form "released" divides by min h itself, so that h_hat is never negative and very certain
    tokens count as very uncertain ones (equations 8 to 13 of the paper need the sign); its statistics were a
    micro-batch's. Logged: hapo_pivot, hapo_sigma, hapo_top, hapo_bottom, which the adaptive temperature of
    the next step's sampler takes. Equal entropies give h_hat 0 everywhere.
    """
    if batch.entropy_now is None:
        raise ValueError(
            "control hapo needs entropy_now, which the batch lacks: the learner did not compute it"
        )
    signal = entropy_signal(batch.entropy_now, batch.mask, rho)
    if signal is None:
        return batch.with_extra(h_hat=torch.zeros_like(batch.entropy_now))
    h_hat = masked(signal.scaled(batch.entropy_now.detach(), form), batch.mask)
    notes = {
        "hapo_pivot": signal.pivot,
        "hapo_sigma": signal.sigma,
        "hapo_top": signal.top,
        "hapo_bottom": signal.bottom,
    }
    return batch.with_extra(h_hat=h_hat).with_metrics(**notes)


def entropy_signal(entropy: Tensor, mask: Tensor, rho: float = 0.8) -> EntropySignal | None:
    """The signal of all masked-in tokens of ``entropy (B, T)`` in nats; None without any."""
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

    ``base (1 + tau h_hat)`` with h_hat clamped to [-1, 1] (new tokens can lie beyond the last step's), hotter
    where the policy is unsure. "released": with the release's sign, hotter at both ends. "unscaled": with h
    itself, unbounded, as the paper's second version prints it. Without a signal (the first step): base. The
    code takes tau 0.05, the paper 0.1.
    """
    if signal is None:
        return torch.full_like(entropy, base)
    if variant == "unscaled":
        return base * (1 + tau * signal.unscaled(entropy))
    return base * (
        1 + tau * signal.scaled(entropy, "released" if variant == "released" else "intended").clamp(-1.0, 1.0)
    )
