"""Proof that an engine multiplies with the learner's weights: a fingerprint per weight, computed on both
sides and compared.
"""

from __future__ import annotations

from collections.abc import Mapping

from rltrain.errors import UserError
from rltrain.tensor_ops import Fingerprint


class WeightMismatchError(RuntimeError):
    """An engine does not hold the weights it was sent."""


class NeverHeldError(WeightMismatchError, UserError):
    """An engine did not hold the weights after the very first load: it cannot load this model, and the user
    must choose another engine.
    """


def compare(learner: Mapping[str, Fingerprint], engine: Mapping[str, Fingerprint], rtol: float) -> None:
    """Raises WeightMismatchError naming the first weight, in the learner's order, that differs by more than
    ``rtol`` or is missing.

    Both sides sum the stored entries in float64, so the numbers of equal weights differ only by the order of
    the sums, below 1e-14. When all n entries of a weight, of size s, move by d in random directions, its
    number moves by about d / (8 s) times a standard normal: at s = 0.02 and rtol 1e-12 a missed step of 1e-6
    stays undetected in one weight of 10 million, a missed step of 1e-8 in one of 80,000 (float32 holds steps
    down to 1e-9 there). A single entry moves the number by d / (8 s sqrt(n)), its last bit in float32 by 7e-9
    / sqrt(n): detected in weights of up to 50 million entries. A change that rounding to the engine's type
    hides does not change the engine.
    """
    for name, fingerprint in learner.items():
        expected = fingerprint.number
        if name not in engine:
            raise WeightMismatchError(
                f"the engine reports no weight {name!r}; it holds {len(engine)}, the learner {len(learner)}"
            )
        held = engine[name].number
        if not abs(held - expected) <= rtol * max(abs(held), abs(expected)):
            raise WeightMismatchError(
                f"weight {name!r}: the engine multiplies with {held:.9g}, the learner has {expected:.9g} "
                f"(fingerprints, rtol {rtol:g}); the last load did not reach it: it must not generate"
            )
    if extra := [name for name in engine if name not in learner]:
        raise WeightMismatchError(
            f"the engine multiplies with {extra[0]!r}, which the learner does not report; compare state_dict "
            "names"
        )
