"""Losses for a Nash policy of a preference that need not come from rewards: INPO and Nash Mirror Prox."""

from __future__ import annotations

from torch import Tensor

from rltrain.loss.preference.ratio import pair_metrics, ref_logp
from rltrain.needs import PAIRS, PREVIOUS_LOGP, PREVIOUS_POLICY, REF_LOGP
from rltrain.registry import method
from rltrain.types.preference import CompletionFacts, ExampleLoss, PairBatch, PolicyPairs, PolicySequences

__all__ = ["inpo", "nash_mp", "symmetrise"]


@method("inpo", arxiv="2407.00617", needs={REF_LOGP, PREVIOUS_LOGP}, traits={PAIRS, PREVIOUS_POLICY})
def inpo(policy: PolicyPairs, batch: PairBatch, *, eta: float = 0.0075, tau: float = 0.0025) -> ExampleLoss:
    """INPO: the margin against reference and previous iterate is regressed on a constant, arXiv:2407.00617.
    Values (N,).

    Formula: ``(h - 1 / (2 eta))^2``, ``h = D ln pi - (tau / eta) D ln pi_ref - (1 - tau / eta) D ln pi_t``,
    ``D f = f(w) - f(l)``

    Log-probs are sums over tokens, and pi_t is the frozen iterate whose samples were compared. eta: step size
    of mirror descent; tau: weight of the reference, 0 < tau <= eta (at eta the previous iterate cancels and
    this is IPO). The target is large: 66.7 nats at the default.
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

    Formula: ``(h - s / 2)^2``, ``s = eta / (1 + eta beta)``, ``h = D ln pi - beta s D ln pi_ref - (1 - beta
    s) D ln pi_k``, ``D f = f(w) - f(l)``

    Log-probs are sums over tokens. Its minimum over pairs of two independent samples of the opponent is the
    proximal step from the centre pi_k (``previous_logp``) against that opponent; it equals ``inpo`` with eta
    ``1 / s`` and tau ``beta``. eta: step size, at most 2; beta: weight of the KL to the reference. An
    iteration is two steps from the same centre, the second with samples of the first step's result. A
    reconstruction: the tabular iteration has the paper's rate, but the paper's recipe for language models was
    not available.
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


def symmetrise(first: Tensor, second: Tensor) -> Tensor:
    """``P(a > b)`` from a judge asked in both orders: ``first`` for a shown before b, ``second`` its P(b > a)
    with b before a.

    This makes P(a > b) + P(b > a) = 1, without which the game has no symmetric equilibrium, and cancels a
    position bias.
    """
    return (first + 1 - second) / 2
