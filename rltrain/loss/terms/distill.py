"""Terms that pull the policy towards another distribution: a teacher's, or the reference's reweighted by
reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rltrain.needs import OLD_LOGP, REF_LOG_MASS, REF_LOGP, TEACHER_LOGP
from rltrain.registry import method
from rltrain.tensor_ops import apply_mask
from rltrain.types.policy import PolicyTokens, TokenLoss, TrainBatch

__all__ = ["kdrl", "rapo", "reference_powers", "teacher_text"]

# Prefix of the statistic ln sum_v pi_ref(v) ** phi, which the learner computes; phi_low follows it.
MASS = "ref_log_mass:"
LOG_RATIO_LIMIT = 20.0  # before exp, as for the ratios of the policy losses


@method("kdrl", arxiv="2506.02208", needs={TEACHER_LOGP})
def kdrl(policy: PolicyTokens, batch: TrainBatch, *, estimator: Literal["k2", "k3"] = "k2") -> TokenLoss:
    """Distillation from a teacher on the policy's completions, added to the policy loss, arXiv:2506.02208.
    Values (B, T), nats.

    Formula: k2: ``d^2 / 2``, k3: ``e^d - d - 1``, ``d = ln pi_teacher - ln pi``

    estimator: the on-policy gradient of "k2" is exactly that of the reverse KL to the teacher; the paper
    reports "k3" as worse. There is no correction for later updates of a step, where the samples are
    off-policy. The control ``kdrl_mask`` selects the completions on which it acts and the number of tokens by
    which it is divided.
    """
    if batch.teacher_logp is None:
        raise ValueError(
            "the kdrl term needs teacher_logp, which the batch lacks; name the teacher in model.teacher"
        )
    d = apply_mask(batch.teacher_logp - policy.logp, batch.mask)
    values = 0.5 * d.square() if estimator == "k2" else torch.exp(d) - d - 1
    return TokenLoss(values * batch.extra["kdrl"] if "kdrl" in batch.extra else values)


@method("teacher_text", arxiv="2603.11178", needs={TEACHER_LOGP})
def teacher_text(policy: PolicyTokens, batch: TrainBatch) -> TokenLoss:
    """Forward KL to the teacher on text that the teacher wrote, arXiv:2603.11178. Values (B, T), nats.

    Formula: ``mark (ln pi_teacher - ln pi)``

    The mark is in ``extra["teacher_text"]``, which the control ``paced`` sets only on rows of the answer
    source. On samples of the teacher its mean is KL(p_T, p), and its gradient is that of the cross-entropy;
    the paper takes the sum over the vocabulary. Its value is an estimate of a KL only if the teacher wrote
    those rows.
    """
    if batch.teacher_logp is None or "teacher_text" not in batch.extra:
        raise ValueError(
            "the teacher_text term needs teacher_logp (model.teacher) and the control paced, and the batch "
            "lacks one of them"
        )
    return TokenLoss(apply_mask(batch.teacher_logp - policy.logp, batch.mask) * batch.extra["teacher_text"])


@method("rapo", arxiv="2510.03865", needs={OLD_LOGP, REF_LOGP, REF_LOG_MASS("{phi_low}")})
def rapo(policy: PolicyTokens, batch: TrainBatch, *, phi_low: float = 0.5, cap: float = 10.0) -> TokenLoss:
    """Forward KL from the reference, flattened where the reward is low, to the policy, arXiv:2510.03865.
    Values (B, T).

    Formula: ``-sg[min(q / pi_old, cap)] ln pi``, ``q = softmax(phi ln pi_ref)``, ``phi = clip(R, phi_low,
    1)``

    A reconstruction: the paper's text gives neither phi nor the level nor Z. Here q is normalised over the
    full vocabulary (``ref_log_mass``: ln of its sum) and R is the completion's reward. The term estimates the
    cross-entropy ``-sum_v q(v) ln pi(v)`` from the sampled token; without the cap it is unbiased in value and
    gradient, also in later updates of a step. Differentiating the estimator of the metric itself (``kl``: rho
    ln rho - rho + 1, rho = q / pi) would give a different gradient. For the paper's entropy bonus add the
    term ``entropy``.
    """
    name = f"{MASS}{phi_low}"
    if batch.ref_logp is None or batch.old_logp is None or name not in batch.extra:
        raise ValueError(
            f"the rapo term needs ref_logp, old_logp and {name!r}, and the batch lacks some of them"
        )
    phi = _power(batch, phi_low)[:, None]
    log_q = apply_mask(phi * batch.ref_logp - batch.extra[name], batch.mask)
    logp = apply_mask(policy.logp, batch.mask)
    weight = (log_q - apply_mask(batch.old_logp, batch.mask)).clamp(max=LOG_RATIO_LIMIT).exp().clamp(max=cap)
    log_rho = (log_q - logp.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    kl = apply_mask(log_rho.exp() * (log_rho - 1) + 1, batch.mask)
    return TokenLoss(apply_mask(-weight * logp, batch.mask), {"kl": kl})


def reference_powers(wants: frozenset[str], batch: TrainBatch) -> dict[str, Tensor]:
    """(B,) powers to which ``rapo`` raises the reference's probabilities, for each "ref_log_mass:PHI_LOW" in
    ``wants``.
    """
    names = [name for name in wants if name.startswith(MASS)]
    return {name: _power(batch, float(name.removeprefix(MASS))) for name in names}


def _power(batch: TrainBatch, low: float) -> Tensor:
    """(B,) the reward clamped to [low, 1]; 1 for a completion without one."""
    return batch.rewards.nan_to_num(nan=1.0).clamp(low, 1.0)
