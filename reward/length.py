"""Lengths as rewards: DAPO's soft punishment of overlong completions, arXiv:2503.14476, equation 13, and
SuperHF's price of a character, arXiv:2310.16763.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from rltrain.reward.score import RewardInputs, Score, reward


def check_length(values: Mapping[str, Any], recipe: Any) -> Iterator[str]:
    limit = values["max_tokens"]
    buffer = values["buffer_tokens"]
    longest = recipe.rollout.max_tokens
    if limit is None or buffer is None or not 0 < buffer <= limit:
        yield (
            f"max_tokens is {limit} and buffer_tokens {buffer}; both are needed, 0 < buffer_tokens <= "
            f"max_tokens; with rollout.max_tokens {longest} write max_tokens: {longest}, buffer_tokens: "
            f"{max(1, longest // 5)}"
        )
    elif limit > longest:
        yield (
            f"max_tokens is {limit}, but completions end at rollout.max_tokens {longest} and never reach it; "
            f"set max_tokens to at most {longest}, and buffer_tokens below it"
        )


@reward("length", check=check_length)
def length(
    inputs: RewardInputs,
    *,
    max_tokens: int | None = None,
    buffer_tokens: int | None = None,
    factor: float = 1.0,
    form: Literal["paper", "released"] = "paper",
) -> list[Score]:
    """``factor`` times a penalty: 0 up to ``max_tokens - buffer_tokens`` tokens, then linear down to -1 at
    ``max_tokens``.

    Beyond ``max_tokens`` the penalty is -1 in the paper's form; in the released code's form (verl) it goes on
    linearly, bounded only by the generation limit. Lengths are ``token_counts``, EOS included. Raises
    ValueError unless both sizes are set and 0 < buffer_tokens <= max_tokens.
    """
    if max_tokens is None or buffer_tokens is None or not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"length: max_tokens is {max_tokens} and buffer_tokens {buffer_tokens}; both are needed, "
            "0 < buffer_tokens <= max_tokens (DAPO: max_tokens 20480, buffer_tokens 4096)"
        )
    start = max_tokens - buffer_tokens
    excess = [max(count - start, 0) / buffer_tokens for count in inputs.token_counts]
    penalties = excess if form == "released" else [min(share, 1.0) for share in excess]
    return [Score(-factor * share, {"over_length": float(share > 0)}) for share in penalties]


@reward("characters")
def characters(inputs: RewardInputs) -> list[Score]:
    """Minus the number of the completion's characters: SuperHF's length penalty, with the price of a
    character as its ``weight`` in the recipe, arXiv:2310.16763.

    Added to the reward by which ``best_of_n`` keeps completions: ``R - weight * characters``.
    """
    return [Score(-float(len(completion))) for completion in inputs.completions]
