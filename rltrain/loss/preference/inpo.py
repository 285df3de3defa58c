"""Losses for a Nash policy of a preference that need not come from rewards: INPO and Nash Mirror Prox."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.loss.preference.ratio import pair_metrics, ref_logp
from rltrain.needs import PAIRS, PREVIOUS_LOGP, PREVIOUS_POLICY, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import CompletionFacts, ExampleLoss, PairBatch, PolicyPairs, PolicySequences

__all__ = ["inpo", "mirror_descent_step", "mirror_prox_step", "nash_mp", "nash_mp_score", "symmetrise"]


@method("inpo", arxiv="2407.00617", needs={REF_LOGP, PREVIOUS_LOGP}, traits={PAIRS, PREVIOUS_POLICY})
def inpo(policy: PolicyPairs, batch: PairBatch, *, eta: float = 0.0075, tau: float = 0.0025) -> ExampleLoss:
    """``(h - 1 / (2 eta))^2``, h the margin against reference and previous iterate, arXiv:2407.00617. Values
    (N,).

    ``h = D log pi - (tau / eta) D log pi_ref - (1 - tau / eta) D log pi_t``, where D is chosen minus
    rejected, log-probs are sums over tokens, and pi_t is the frozen iterate whose samples were compared. eta:
    step size of mirror descent; tau: weight of the reference, 0 < tau <= eta (at eta the previous iterate
    cancels and this is IPO). The target is large: 66.7 nats at the default.
    """
    if not 0 < tau <= eta:
        raise ValueError(f"inpo: tau is {tau} and eta {eta}, expected 0 < tau <= eta")
    chosen = _log_ratio_to_both(policy.chosen, batch.chosen, tau / eta)
    rejected = _log_ratio_to_both(policy.rejected, batch.rejected, tau / eta)
    return ExampleLoss(
        (chosen - rejected - 1 / (2 * eta)).square(), pair_metrics(policy, eta * chosen, eta * rejected)
    )


@method("nash_mp", arxiv="2505.19731", needs={REF_LOGP, PREVIOUS_LOGP}, traits={PAIRS, PREVIOUS_POLICY})
def nash_mp(policy: PolicyPairs, batch: PairBatch, *, eta: float = 2.0, beta: float = 0.5) -> ExampleLoss:
    """One proximal step of Nash Mirror Prox as a regression on pairs, arXiv:2505.19731. Values (N,).

    ``(h - s / 2)^2`` with ``s = eta / (1 + eta beta)`` and ``h = D log pi - beta s D log pi_ref - (1 - beta
    s) D log pi_k``, where D is chosen minus rejected and log-probs are sums over tokens. Its minimum over
    pairs of two independent samples of the opponent is the proximal step from the centre pi_k
    (``previous_logp``) against that opponent; it equals ``inpo`` with eta ``1 / s`` and tau ``beta``. eta:
    step size, at most 2; beta: weight of the KL to the reference. An iteration is two steps from the same
    centre, the second with samples of the first step's result. A reconstruction: the tabular iteration has
    the paper's rate, but the paper's recipe for language models was not available.
    """
    if not (0 < eta <= 2 and beta > 0):
        raise ValueError(
            f"nash_mp: eta is {eta} and beta {beta}, expected 0 < eta <= 2 (preferences lie in [0, 1]) and "
            "beta > 0"
        )
    return inpo(policy, batch, eta=beta + 1 / eta, tau=beta)


def _log_ratio_to_both(policy: PolicySequences, facts: CompletionFacts, share: float) -> Tensor:
    if facts.previous_logp is None:
        raise ValueError("inpo compares with the frozen previous iterate, but previous_logp was not computed")
    return policy.logp - share * ref_logp(facts) - (1 - share) * facts.previous_logp.detach()


def mirror_descent_step(
    policy: Tensor, reference: Tensor, preference: Tensor, *, eta: float, tau: float
) -> Tensor:
    """(K,) ``pi_{t+1} ~ exp(P(y > pi_t) / eta) pi_ref^(tau/eta) pi_t^(1 - tau/eta)`` over K answers,
    arXiv:2407.00617.

    preference (K, K): entry (i, j) is the probability that answer i beats answer j. INPO's loss has the fixed
    point of this update.
    """
    share = tau / eta
    return torch.softmax(
        preference @ policy / eta + share * reference.log() + (1 - share) * policy.log(), dim=0
    )


def mirror_prox_step(
    policy: Tensor, reference: Tensor, preference: Tensor, *, eta: float = 2.0, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(K,) each: the extrapolated policy and the next one of Nash Mirror Prox over K answers,
    arXiv:2505.19731.

    Both are proximal steps from ``policy``, the first against itself, the second against the extrapolated
    policy; if the second also started from the extrapolated policy, it would be plain self-play without the
    guarantee. eta: step size, at most 2 for preferences in [0, 1]; beta: weight of the KL to the reference.
    The updates are reconstructed from mirror prox and reach the paper's rate ``(1 + 2 beta)^-N`` over N such
    steps.
    """

    def step(opponent: Tensor) -> Tensor:
        scores = eta * (preference @ opponent) + eta * beta * reference.log() + policy.log()
        return torch.softmax(scores / (1 + eta * beta), dim=0)

    extrapolated = step(policy)
    return extrapolated, step(extrapolated)


def nash_mp_score(
    wins: Tensor, logp: Tensor, ref_logp: Tensor, centre_logp: Tensor, *, eta: float = 2.0, beta: float = 0.5
) -> Tensor:
    """(B,) detached ``P - 1/2 - beta log(pi / pi_ref) - (1 / eta) log(pi / pi_k)``: the reward of one
    proximal step by sampling.

    wins (B,): probability that the sampled answer beats the opponent's; the log-probs are sums over tokens
    (B,), of the policy, the reference and the step's centre pi_k. The score multiplies -log pi as an
    advantage. A reconstruction for language models of arXiv:2505.19731, whose own recipe was not available.
    """
    return (wins - 0.5 - beta * (logp - ref_logp) - (logp - centre_logp) / eta).detach()


def symmetrise(first: Tensor, second: Tensor) -> Tensor:
    """``P(a > b)`` from a judge asked in both orders: ``first`` for a shown before b, ``second`` its P(b > a)
    with b before a.

    This makes P(a > b) + P(b > a) = 1, without which the game has no symmetric equilibrium, and cancels a
    position bias.
    """
    return (first + 1 - second) / 2
