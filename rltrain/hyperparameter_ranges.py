"""Ranges of the hyperparameters of registered methods, by the name that they have in every method."""

from __future__ import annotations

from typing import Any

__all__ = ["expected_range"]

# Hyperparameters that are scales, widths, weights, counts or limits in every method that has them.
_NOT_NEGATIVE = frozenset(
    {
        "alpha1",
        "alpha2",
        "beta",
        "beta1",
        "beta2",
        "cap",
        "dual_clip",
        "eps",
        "eps_high",
        "eps_low",
        "eta",
        "kl_coef",
        "max_weight",
        "noise",
        "sft_weight",
        "sigma",
        "tau",
        "temperature",
        "warmup_steps",
        "weight_desirable",
        "weight_undesirable",
    }
)
# Counts and limits of which none is useless.
_POSITIVE = frozenset(
    {
        "concurrency",
        "every",
        "file_mib",
        "max_tests",
        "max_tokens",
        "memory_mib",
        "message_mib",
        "n",
        "output_mib",
        "processes",
        "rounds",
        "seconds",
        "top_k",
        "total_seconds",
        "window",
    }
)
# Shares, probabilities and quantiles that may be 0 (those above 0 have the trait "fraction:NAME").
_SHARES = frozenset({"flip_rate", "min_share", "quantile", "rho", "sft_share"})


def expected_range(key: str, value: Any) -> str | None:
    """The range of the hyperparameter ``key``, in words, if ``value`` is a number outside it."""
    if not isinstance(value, int | float):
        return None
    if key in _NOT_NEGATIVE and value < 0:
        return "at least 0"
    if key in _POSITIVE and value <= 0:
        return "above 0"
    if key in _SHARES and not 0 <= value <= 1:
        return "from 0 to 1"
    return None
