"""SuperHF: fine-tune on the best of many samples with a KL prior.

The filter is ``advantage/best_of_n.py``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rltrain.tensor_ops import masked_mean

__all__ = ["kl_per_position", "length_penalised", "superhf"]


def length_penalised(reward: Tensor, characters: Tensor, penalty: float) -> Tensor:
    """(B,) ``reward - penalty * characters``, which the filter compares, arXiv:2310.16763."""
    return reward - penalty * characters


def kl_per_position(
    logits: Tensor, ref_logits: Tensor, *, direction: Literal["from_reference", "to_reference"]
) -> Tensor:
    """(...) nats over the last axis V; the reference is detached.

    "from_reference" is KL(p_0, p), which covers the prior's modes, as in the released code; "to_reference" is
    KL(p, p_0), the usual prior of RLHF.
    """
    policy = logits.log_softmax(-1)
    frozen = ref_logits.detach().log_softmax(-1)
    if direction == "from_reference":
        return (frozen.exp() * (frozen - policy)).sum(-1)
    return (policy.exp() * (policy - frozen)).sum(-1)


def superhf(logp: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float = 0.35) -> tuple[Tensor, Tensor]:
    """(B, T) negative log-likelihood per token, and (B,) the KL prior per completion, arXiv:2310.16763.

    The loss of an update is the mean of the first over tokens plus the mean of the second, ``kl_coef max(0,
    mean_t KL_t)``, over completions. kl (B, T) is a full-vocabulary KL at the positions that predict the
    tokens. The released code takes the positions one token later, and adds the KLs of a minibatch instead of
    averaging them, so that their weight grows with the size of the minibatch.
    """
    return -logp, kl_coef * masked_mean(kl, mask, dim=1).clamp(min=0)
