"""The KL to the reference and the entropy bonus as additive loss terms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import ENTROPY_GRAD, OLD_LOGP, PENALTY_OF_REWARD, REF_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["entropy", "kl"]


@method(
    "kl",
    arxiv="2402.03300",
    needs={REF_LOGP},
    needs_if={"ratio_corrected": {OLD_LOGP}},
    traits={PENALTY_OF_REWARD("kl_coef")},
    refuses={
        "estimator": {
            "k1": "its gradient as a loss term is that of log pi, whose expectation is 0: it adds noise and "
            "no pull towards the reference; use k2 or k3 here, or put k1 into the reward (reinforce_pp: "
            "kl_coef)"
        }
    },
)
def kl(
    policy: PolicyTokens,
    batch: TrainBatch,
    *,
    estimator: Literal["k2", "k3", "k1_plus", "k3_plus", "abs"] = "k3",
    clamp: Literal["none", "verl"] = "none",
    ratio_corrected: bool = False,
) -> TokenLoss:
    """Estimate of KL(pi || pi_ref) on the sampled tokens, in nats. Values (B, T).

    Formula: k2: ``d^2 / 2``, k3: ``e^d - d - 1``, abs: ``|d|``, ``d = ln pi_ref - ln pi``

    estimator: the on-policy gradient of k2 is exactly that of the reverse KL; k3 (GRPO, arXiv:2402.03300) is
    unbiased and never negative, and its on-policy gradient is that of the forward KL; that of abs has one
    size for every token (verl). The ``_plus`` forms have the value of their estimator (k1 = -d) and the
    gradient of k2. clamp "verl" limits d to +-20 and k3 to at most 10, beyond which the token has no
    gradient. ratio_corrected multiplies by pi / pi_old, with gradient (TRL's use_bias_correction_kl).
    """
    if batch.ref_logp is None:
        raise ValueError("the kl term needs ref_logp, which the batch lacks")
    d = apply_mask(batch.ref_logp - policy.logp, batch.mask)
    if estimator == "k2":
        values = 0.5 * d.square()
    elif estimator == "abs":
        values = d.abs()
    elif estimator == "k3":
        values = _k3(d, clamp)
    else:
        estimate = -d if estimator == "k1_plus" else _k3(d, clamp)
        k2 = 0.5 * d.square()
        values = estimate.detach() + (k2 - k2.detach())
    if ratio_corrected:
        if batch.old_logp is None:
            raise ValueError("the kl term with ratio_corrected needs old_logp, which the batch lacks")
        values = values * apply_mask(policy.logp - batch.old_logp, batch.mask).exp()
    return TokenLoss(values)


@method("entropy", needs={ENTROPY_GRAD})
def entropy(policy: PolicyTokens, batch: TrainBatch) -> TokenLoss:
    """Entropy bonus of the current policy at each token, in nats (Williams and Peng 1991).

    Formula: ``-H``

    Values (B, T).
    """
    if policy.entropy is None:
        raise ValueError("the entropy term needs policy.entropy, which was not computed")
    return TokenLoss(-apply_mask(policy.entropy, batch.mask))


def _k3(d: Tensor, clamp: Literal["none", "verl"]) -> Tensor:
    if clamp == "none":
        return torch.exp(d) - d - 1
    bounded = d.clamp(-20.0, 20.0)
    return (bounded.exp() - bounded - 1).clamp(-10.0, 10.0)
