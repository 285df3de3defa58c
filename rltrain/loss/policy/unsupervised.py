"""Losses that use neither reward nor advantage, only the policy's uncertainty on its own samples."""

from __future__ import annotations

from rltrain.needs import ENTROPY, ENTROPY_GRAD, REWARD_FREE
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["em_ft", "one_shot_em"]


@method("em_ft", arxiv="2505.15134", needs={ENTROPY_GRAD}, traits={REWARD_FREE})
def em_ft(policy: PolicyTokens, batch: TrainBatch) -> TokenLoss:
    """EM-FT: minimises the entropy of each token's full distribution, arXiv:2505.15134. Values (B, T), nats.

    Formula: ``H``

    The sampled tokens are fixed: the gradient comes from the entropies alone. The paper sums over a
    completion's tokens and takes the mean over completions (aggregate ``seq_mean_token_sum``), which favours
    short completions: watch the length. Long training collapses; the paper stops early by a validation set.
    """
    if policy.entropy is None:
        raise ValueError("the em_ft loss needs policy.entropy, which was not computed")
    return TokenLoss(apply_mask(policy.entropy, batch.mask))


@method("one_shot_em", arxiv="2505.20282", needs={ENTROPY("{temperature}")}, traits={REWARD_FREE})
def one_shot_em(policy: PolicyTokens, batch: TrainBatch, *, temperature: float = 0.5) -> TokenLoss:
    """One-shot EM: the entropy of the sharpened distribution at each generated token, arXiv:2505.20282.
    Values (B, T), nats.

    Formula: ``H(softmax(logits / temperature))``

    Use one prompt, many samples, about ten steps, and the aggregate ``token_mean``. The released code reads
    the distributions one position late: it omits the one that produced the first token and includes the one
    after the last token. Here each token has its own.
    """
    name = f"entropy:{temperature}"
    if name not in policy.extra:
        raise ValueError(f"the one_shot_em loss needs the statistic {name!r}, which was not computed")
    return TokenLoss(apply_mask(policy.extra[name], batch.mask))
