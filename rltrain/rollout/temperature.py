"""HAPO's adaptive temperature, arXiv:2509.16591: every token is drawn at its own temperature, which is higher
where the policy is unsure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rltrain.control.hapo import EntropySignal, adaptive_temperature, entropy_signal
from rltrain.types.samples import AdaptiveTemperature, Sampling

__all__ = ["TemperatureController", "entropy_of", "token_temperatures"]

# of the base temperature: the unscaled form has no lower bound, and a temperature must be above 0
LEAST_SHARE = 0.1


class TemperatureController:
    """Measures the entropy signal of each training step, from which the next step's temperatures follow; the
    first step samples at the base temperature.

    tau: how far temperatures spread around the base. variant: "scaled" is h_hat in [-1, 1]; "released" has
    the release's sign; "unscaled" is h itself, as the paper's second version prints it. rho: quantile of ln H
    that keeps the base temperature.
    """

    def __init__(self, *, tau: float, variant: Literal["scaled", "released", "unscaled"], rho: float) -> None:
        self._tau = tau
        self._rho = rho
        self._variant: Literal["scaled", "released", "unscaled"] = variant
        self._signal: EntropySignal | None = None

    def sampling(self, base: Sampling) -> Sampling:
        """``base`` with the temperature of each token adapted, once a step has been observed."""
        if self._signal is None:
            return base
        signal = self._signal
        adaptive = AdaptiveTemperature(
            self._tau, self._variant, signal.pivot, signal.sigma, signal.top, signal.bottom
        )
        return dataclasses.replace(base, adaptive=adaptive)

    def observe(self, entropy: Tensor, sampled: Tensor) -> None:
        """Measures the signal of a step. entropy: (B, T) nats, of the policy that sampled; sampled: (B, T)
        bool, the tokens that the policy wrote.

        A step without tokens, or with entropies that are not finite, leaves the signal unchanged.
        """
        if bool(entropy[sampled].isfinite().all()):
            self._signal = entropy_signal(entropy, sampled, self._rho) or self._signal

    def notes(self) -> dict[str, float]:
        """Pivot and width of the current signal, of ln H; empty before the first step."""
        if self._signal is None:
            return {}
        return {"temperature_pivot": self._signal.pivot, "temperature_sigma": self._signal.sigma}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._signal is None else dataclasses.asdict(self._signal)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._signal = EntropySignal(**state) if state else None


def token_temperatures(entropy: Tensor, base: float, adaptive: AdaptiveTemperature) -> Tensor:
    """The temperature of each token. entropy: nats, of softmax(logits / base), any shape.

    At least ``LEAST_SHARE`` of ``base``.
    """
    signal = EntropySignal(adaptive.pivot, adaptive.sigma, adaptive.top, adaptive.bottom)
    return adaptive_temperature(entropy, signal, base, adaptive.tau, adaptive.variant).clamp(
        min=LEAST_SHARE * base
    )


def entropy_of(logits: Tensor) -> Tensor:
    """(R,) nats: the entropy of softmax(logits), logits (R, V) float32. Logits of -inf contribute nothing."""
    logp = torch.log_softmax(logits, dim=-1)
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(dim=-1)
