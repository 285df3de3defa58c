"""DAPO's soft punishment of overlong completions, arXiv:2503.14476, equation 13."""

from __future__ import annotations

from typing import Literal

from reward.score import RewardInputs, Score, reward


@reward("length")
def length(
    inputs: RewardInputs,
    *,
    max_tokens: int | None = None,
    buffer_tokens: int | None = None,
    factor: float = 1.0,
    form: Literal["paper", "released"] = "paper",
) -> list[Score]:
    """``factor`` times 0 up to ``max_tokens - buffer_tokens`` tokens, then linear down to -1 at
    ``max_tokens``.

    Beyond ``max_tokens``: -1 in the paper's form, ever lower in the released code's (verl), which only a
    generation limit bounds. Counts are ``token_counts``, EOS included. Raises ValueError unless 0 <
    buffer_tokens <= max_tokens, both given.
    """
    if max_tokens is None or buffer_tokens is None or not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"length: max_tokens is {max_tokens} and buffer_tokens {buffer_tokens}; both are needed, 0 < "
            "buffer_tokens <= max_tokens "
            "(DAPO: max_tokens 20480, buffer_tokens 4096)"
        )
    start = max_tokens - buffer_tokens
    over = [max(count - start, 0) / buffer_tokens for count in inputs.token_counts]
    punished = over if form == "released" else [min(share, 1.0) for share in over]
    return [Score(-factor * share, {"over_length": float(share > 0)}) for share in punished]
