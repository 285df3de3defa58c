"""Proof that an engine multiplies with the learner's weights: a fingerprint per weight, taken on both
sides and compared.
"""

from __future__ import annotations

from collections.abc import Mapping

from rltrain.errors import UserError
from rltrain.tensor_ops import Fingerprint


class WeightMismatchError(RuntimeError):
    """An engine does not hold the weights it was sent."""


class NeverHeldError(WeightMismatchError, UserError):
    """It did not hold them after the very first load: this engine cannot be given this model, and
    another must be chosen.
    """


def compare(learner: Mapping[str, Fingerprint], engine: Mapping[str, Fingerprint], rtol: float) -> None:
    """Raises WeightMismatchError naming the first weight, in the learner's order, that differs by more than
    ``rtol`` or is missing.

    Both sides sum the stored entries in float64, so numbers of equal weights differ by the order of the sums
    alone, below 1e-14. A weight whose n entries, of size s, all move by d in random directions moves its
    number by about d / (8 s) times a standard normal: at s = 0.02 and rtol 1e-12 one weight in 10 million is
    not seen to have missed a step of 1e-6, one in 80,000 a step of 1e-8 (float32 holds steps down to 1e-9
    there). A single entry moves it by d / (8 s sqrt(n)), its last bit in float32 by 7e-9 / sqrt(n): seen in
    weights of up to 50 million entries. What rounding to the engine's type hides is no change of the engine.
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
                f"(fingerprints, rtol {rtol:g}); "
                "the last load did not reach it: it must not generate"
            )
    if extra := [name for name in engine if name not in learner]:
        raise WeightMismatchError(
            f"the engine multiplies with {extra[0]!r}, which the learner does not report; compare state_dict "
            "names"
        )
