"""DPO and the variants that differ only in the function of its logit ``z = beta (u_chosen - u_rejected)``.

``u = log pi(y|x) - log pi_ref(y|x)`` is a sum over the completion's tokens. All take PolicyPairs and a
PairBatch and return values (N,). If the policy equals its reference they are ln 2 for the sigmoid forms, 1
for hinge, 1 / (4 tau^2) for IPO.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from rltrain.loss.preference.ratio import log_ratios, pair_metrics, per_token
from rltrain.needs import PAIRS, REF_LOGP, REFERENCE_FREE
from rltrain.registry import method
from rltrain.types.preference import ExampleLoss, PairBatch, PolicyPairs

__all__ = [
    "cdpo",
    "dpo",
    "dpo_length_normalised",
    "dpo_reference_free",
    "hinge",
    "ipo",
    "robust_dpo",
    "soft_logistic",
]


def soft_logistic(logit: Tensor, p_chosen: Tensor | float) -> Tensor:
    """(N,) ``-p ln sigmoid(z) - (1 - p) ln sigmoid(-z)``: cross-entropy for the preference p."""
    return -p_chosen * logsigmoid(logit) - (1 - p_chosen) * logsigmoid(-logit)


@method("dpo", arxiv="2305.18290", needs={REF_LOGP}, traits={PAIRS})
def dpo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1) -> ExampleLoss:
    """DPO: the chosen answer's implicit reward above the rejected one's, arXiv:2305.18290.

    Formula: ``-ln sigmoid(z)``

    Values (N,). beta: temperature of the implicit reward ``beta u``.
    """
    chosen, rejected = log_ratios(policy, batch)
    return ExampleLoss(
        -logsigmoid(beta * (chosen - rejected)), pair_metrics(policy, beta * chosen, beta * rejected)
    )


@method("cdpo", needs={REF_LOGP}, traits={PAIRS})
def cdpo(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, flip_rate: float = 0.2) -> ExampleLoss:
    """Conservative DPO: the label is wrong with the probability e, flip_rate (Mitchell 2023). Values (N,).

    Formula: ``-(1 - e) ln sigmoid(z) - e ln sigmoid(-z)``

    beta as in ``dpo``. The minimum is at a finite margin, ``z = logit(1 - flip_rate)``. The note gives no
    default; 0.2 is HALOs'. TRL 1.x ignores its label_smoothing here, so its numbers are plain DPO's.
    """
    _check_flip_rate("cdpo", flip_rate)
    chosen, rejected = log_ratios(policy, batch)
    values = soft_logistic(beta * (chosen - rejected), 1 - flip_rate)
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("robust_dpo", arxiv="2403.00409", needs={REF_LOGP}, traits={PAIRS})
def robust_dpo(
    policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, flip_rate: float = 0.1
) -> ExampleLoss:
    """Unbiased if labels are flipped at ``flip_rate``: its mean over flips is DPO's loss, arXiv:2403.00409.
    Values (N,).

    Formula: ``[-(1 - e) ln sigmoid(z) + e ln sigmoid(-z)] / (1 - 2 e)``

    e is the flip_rate, in [0, 0.5); beta as in ``dpo``. It is not bounded below: badly violated pairs have
    larger gradients than in DPO.
    """
    _check_flip_rate("robust_dpo", flip_rate)
    chosen, rejected = log_ratios(policy, batch)
    logit = beta * (chosen - rejected)
    values = (-(1 - flip_rate) * logsigmoid(logit) + flip_rate * logsigmoid(-logit)) / (1 - 2 * flip_rate)
    return ExampleLoss(values, pair_metrics(policy, beta * chosen, beta * rejected))


@method("hinge", arxiv="2309.06657", needs={REF_LOGP}, traits={PAIRS})
def hinge(policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1) -> ExampleLoss:
    """The hinge of SLiC and RSO on DPO's logit, arXiv:2309.06657.

    Formula: ``max(0, 1 - z)``

    Values (N,). 1 / beta is the required margin, in nats.
    """
    chosen, rejected = log_ratios(policy, batch)
    return ExampleLoss(
        (1 - beta * (chosen - rejected)).relu(), pair_metrics(policy, beta * chosen, beta * rejected)
    )


@method("ipo", arxiv="2310.12036", needs={REF_LOGP}, traits={PAIRS})
def ipo(
    policy: PolicyPairs, batch: PairBatch, *, tau: float = 0.1, log_ratio: Literal["sum", "per_token"] = "sum"
) -> ExampleLoss:
    """IPO: squared distance of the margin from a constant, arXiv:2310.12036. Values (N,).

    Formula: ``(u_w - u_l - 1 / (2 tau))^2``

    log_ratio: "sum" over tokens, as in the paper's equation 17 and OpenRLHF, or "per_token", divided by each
    completion's length as in TRL and HALOs. For the same tau the two differ by orders of magnitude.
    """
    chosen, rejected = log_ratios(policy, batch)
    if log_ratio == "per_token":
        chosen = per_token(chosen, batch.chosen)
        rejected = per_token(rejected, batch.rejected)
    values = (chosen - rejected - 1 / (2 * tau)).square()
    return ExampleLoss(values, pair_metrics(policy, tau * chosen, tau * rejected))


@method("dpo_length_normalised", arxiv="2411.15124", needs={REF_LOGP}, traits={PAIRS})
def dpo_length_normalised(policy: PolicyPairs, batch: PairBatch, *, beta: float = 5.0) -> ExampleLoss:
    """DPO on log-ratios per token, as in Tulu 3, arXiv:2411.15124. Values (N,).

    Formula: ``-ln sigmoid(beta (u_w / |w| - u_l / |l|))``

    beta is Tulu 3's: per-token ratios are hundreds of times smaller than sums, and beta 0.1 would hardly
    train.
    """
    chosen, rejected = log_ratios(policy, batch)
    chosen = per_token(chosen, batch.chosen)
    rejected = per_token(rejected, batch.rejected)
    return ExampleLoss(
        -logsigmoid(beta * (chosen - rejected)), pair_metrics(policy, beta * chosen, beta * rejected)
    )


@method("dpo_reference_free", arxiv="2305.18290", traits={PAIRS, REFERENCE_FREE})
def dpo_reference_free(
    policy: PolicyPairs, batch: PairBatch, *, beta: float = 0.1, logp: Literal["sum", "per_token"] = "sum"
) -> ExampleLoss:
    """DPO against a uniform reference: log-probs instead of log-ratios, arXiv:2305.18290 (the authors' code).
    Values (N,).

    Formula: ``-ln sigmoid(beta (ln pi(w) - ln pi(l)))``

    beta as in ``dpo``. logp: "sum" over tokens, or "per_token", which is SimPO (arXiv:2405.14734) without its
    margin and needs a beta of 2 or more.
    """
    chosen = policy.chosen.logp
    rejected = policy.rejected.logp
    if logp == "per_token":
        chosen = per_token(chosen, batch.chosen)
        rejected = per_token(rejected, batch.rejected)
    return ExampleLoss(
        -logsigmoid(beta * (chosen - rejected)), pair_metrics(policy, beta * chosen, beta * rejected)
    )


def _check_flip_rate(loss: str, flip_rate: float) -> None:
    if not 0 <= flip_rate < 0.5:
        raise ValueError(
            f"{loss}: flip_rate is {flip_rate}, expected [0, 0.5): at 0.5 the labels say nothing"
        )
