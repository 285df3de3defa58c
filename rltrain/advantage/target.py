"""KL-regularised RL as inference: target distributions, their normaliser, and the weights that move a policy
towards them.

The optimum of ``E[r] - beta KL(pi, pi_0)`` is ``p ~ pi_0 exp(r / beta)``, and for every policy ``E[r] - beta
KL(pi, pi_0) = beta log Z - beta KL(pi, p)``, arXiv:2205.11275. So a target can be defined first, from rewards
or from the moments it must have (GDC), and then approached under any divergence (DPG). Everything is in log
space; nothing carries a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import MASK, OLD_LOGP, REF_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import masked_sum, segment_mean

__all__ = [
    "binary_moment",
    "dpg",
    "effective_sample_size",
    "fit_moments",
    "kl_to_target",
    "log_partition",
    "log_tilted_prob",
    "pull",
]

Divergence = Literal["forward_kl", "reverse_kl", "js", "total_variation", "chi_squared"]


def log_tilted_prob(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """(B,) unnormalised ``log P(y) = log pi_0(y) + r(y) / beta``; for moments r = phi @ lambda, beta 1."""
    return ref_logp + reward / beta


def log_partition(log_weight: Tensor) -> Tensor:
    """() ``log Z = log mean_{y ~ q} P(y) / q(y)`` from log_weight (S,) = log P - log q."""
    return torch.logsumexp(log_weight, dim=0) - math.log(len(log_weight))


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """() effective number of the S importance weights, from 1 to S."""
    weight = torch.exp(log_weight - log_weight.max())
    return weight.sum().square() / weight.square().sum()


def kl_to_target(
    log_z: Tensor | float, reward: Tensor | float, kl: Tensor | float, beta: float
) -> Tensor | float:
    """KL(pi, p) in nats: ``log Z - (E[r] - beta KL(pi, pi_0)) / beta``.

    log Z is constant over a run, so differences are exact.
    """
    return log_z - (reward - beta * kl) / beta


def binary_moment(rate: float, target: float) -> float:
    """lambda that moves the mean of a 0/1 feature from ``rate`` under pi_0 to ``target``: logit(target) -
    logit(rate).
    """
    if not (0 < rate < 1 and 0 < target < 1):
        raise ValueError(
            f"a 0/1 feature with mean {rate} cannot get mean {target}: both must lie strictly between 0 and 1"
        )
    return math.log(target / (1 - target)) - math.log(rate / (1 - rate))


def fit_moments(
    features: Tensor,
    target: Tensor,
    *,
    lr: float = 0.05,
    iterations: int = 1000,
    tolerance: float = 1e-5,
    weight: Tensor | None = None,
) -> Tensor:
    """(F,) lambda with ``E_p[phi] = target`` for ``p ~ pi_0 exp(phi @ lambda)``, by self-normalised
    importance sampling.

    features (S, F) of samples from pi_0, weighted by ``weight (S,)`` if they are not equally likely; target
    (F,). Takes gradient steps of size lr until the largest miss is below tolerance. Raises ValueError if the
    iterations do not suffice, for example because no sample has a feature that the target asks for.
    """
    base = torch.zeros_like(features[:, 0]) if weight is None else weight.log()
    lam = torch.zeros_like(target)
    for _ in range(iterations):
        miss = torch.softmax(base + features @ lam, dim=0) @ features - target
        if float(miss.abs().max()) < tolerance:
            return lam
        lam = lam - lr * miss
    raise ValueError(
        f"moments {target.tolist()} still missed by more than {tolerance} after {iterations} iterations over "
        f"{len(features)} samples; take more samples, more iterations or a larger lr"
    )


def pull(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """(B,) ``-f'(pi / p)`` at log_ratio = log pi - log p, for D_f = E_p[f(pi / p)]: by how much the
    probability of a sample should rise.

    forward_kl is KL(p, pi) with p / pi; reverse_kl KL(pi, p) with -log(pi / p) - 1; js as in f-DPO
    (arXiv:2309.16240), without a factor 1/2; total_variation f = |t - 1| / 2; chi_squared f = (t - 1)^2.
    """
    if divergence == "forward_kl":
        return torch.exp(-log_ratio)
    if divergence == "reverse_kl":
        return -log_ratio - 1
    if divergence == "js":
        return -math.log(2) - torch.nn.functional.logsigmoid(log_ratio)
    if divergence == "total_variation":
        return -0.5 * log_ratio.sign()
    return -2 * torch.expm1(log_ratio)


@method("dpg", arxiv="2205.11275", needs={MASK, OLD_LOGP, REF_LOGP})
def dpg(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    beta: float = 1.0,
    divergence: Literal["forward_kl", "reverse_kl", "js", "total_variation", "chi_squared"] = "forward_kl",
    partition: Literal["prompt", "step"] = "prompt",
    baseline: Literal["mean", "none"] = "mean",
    max_weight: float = 1000.0,
) -> Tensor:
    """Policy gradient towards a target distribution, the reference tilted by the reward, under a divergence,
    arXiv:2205.11275. Returns (B,).

    Formula: ``a - mean a`` of ``a = clip(-f'(pi / p), +-max_weight)``, with ``p(y|x) = pi_0(y|x) exp(R /
    beta) / Z(x)``; forward KL: ``-f' = p / pi``

    -f' is ``pull``; for the forward KL it is the importance weight of the completion (GDC, DPG). The
    log-probs before the update serve as pi and as proposal, as in one on-policy update per step. partition:
    log Z comes from the importance weights of the prompt's completions ("prompt"), or of the whole step
    ("step", for tasks of one prompt). baseline: their "mean" over the same rows is subtracted, or nothing;
    for the forward KL the mean is 1. They are clamped first, because weights of whole sequences explode. For
    moments of several features the reward is their weighted sum, with beta 1. Pair it with ``reinforce`` and
    a sum over tokens. NaN rewards get 0.
    """
    graded = ~rewards.isnan() & mask.any(dim=1)
    policy = masked_sum(old_logp, mask, dim=1)
    frozen = masked_sum(ref_logp, mask, dim=1)
    advantages = torch.zeros_like(policy).detach()
    if not bool(graded.any()):
        return advantages

    ids = (group if partition == "prompt" else torch.zeros_like(group))[graded]
    log_target = log_tilted_prob(frozen[graded], rewards[graded].to(frozen.dtype), beta)
    log_weight = (log_target - policy[graded]).detach()
    log_ratio = _group_log_mean_exp(log_weight, ids) - log_weight
    weight = pull(log_ratio, divergence).clamp(-max_weight, max_weight)
    advantages[graded] = weight - segment_mean(weight, ids) if baseline == "mean" else weight
    return advantages


def _group_log_mean_exp(values: Tensor, group: Tensor) -> Tensor:
    """(B,) log of the mean of exp(values) over each group, at every row."""
    index = torch.unique(group, return_inverse=True)[1]
    top = torch.full_like(values, -torch.inf).scatter_reduce(0, index, values, "amax")[index]
    return top + torch.log(segment_mean((values - top).exp(), group))
