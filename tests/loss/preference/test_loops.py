"""The mathematics around the losses: margins, pairing, Nash steps, filters, pass-rate weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rltrain.advantage.best_of_n import keep_best
from rltrain.control.paced import paced_weight, smoothed_pass_rate
from rltrain.loss.preference.inpo import inpo, nash_mp, symmetrise
from rltrain.loss.preference.margins import gamma_for_target, margins, mean_target, target_probability
from rltrain.loss.preference.mmpo import ranked_pair_strengths
from rltrain.loss.preference.spo import spo_degree
from rltrain.types.preference import CompletionFacts, ExampleLoss, PairBatch, PolicyPairs, PolicySequences

GAME = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]], dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor, *expected: float) -> bool:
    """Equal to 1e-6, one by one."""
    return got.numel() == len(expected) and torch.allclose(
        got.reshape(-1), doubles(*expected), rtol=0, atol=1e-6
    )


REF = doubles(0.5, 0.3, 0.2)


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


def test_margins_keep_the_datas_units_unless_told_otherwise():
    margin = margins(doubles(9, 7.5), doubles(5, 7))
    assert close(margin, 4.0, 0.5)
    assert close(target_probability(margin, 0.3), 0.768525, 0.537430)
    assert close(margins(doubles(9, 7.5), doubles(5, 7), divide_by="max_abs"), 1.0, 0.125)
    # standard deviation with ddof 1 of (4, 0.5): 3.5 / sqrt(2)
    assert close(
        margins(doubles(9, 7.5), doubles(5, 7), divide_by="std"),
        4 * math.sqrt(2) / 3.5,
        0.5 * math.sqrt(2) / 3.5,
    )
    assert close(margins(doubles(1), doubles(3)), -2.0)


def test_scores_without_a_difference_are_an_error():
    with pytest.raises(ValueError, match=r"1 of 2 pairs have no finite margin \(first: row 1\)"):
        margins(doubles(1, math.nan), doubles(0, 0))
    with pytest.raises(ValueError, match="all 2 margins are equal"):
        margins(doubles(1, 2), doubles(0, 1), divide_by="std")


def test_gamma_can_be_found_for_a_mean_target():
    margin = doubles(4, 0.5, -1, 0)
    gamma = gamma_for_target(margin, 0.8)
    assert mean_target(margin, gamma) == pytest.approx(0.8, abs=1e-9)
    # one margin of 2 and target 0.9: sigmoid(2 g) = 0.9, g = ln(9) / 2
    assert gamma_for_target(doubles(2.0), 0.9) == pytest.approx(math.log(9) / 2)
    with pytest.raises(ValueError, match="25% ties"):
        gamma_for_target(margin, 0.9)  # at most 0.75 + 0.125


def test_ranked_pairs_come_from_n_win_rates():
    pairs, strength = ranked_pair_strengths(doubles(0.3, 0.9, 0.6))
    assert pairs.tolist() == [[1, 2], [1, 0], [2, 0]]
    assert close(strength, 0.857143, 0.954545, 0.777778)
    assert ranked_pair_strengths(doubles(1.0, 0.0))[1].isfinite().all()


def test_a_symmetrised_judge_has_no_position_bias():
    # a judge that adds 0.2 to whatever is shown first: P(a > b) = 0.7 is heard as 0.9, P(b > a) = 0.3 as 0.5
    assert float(symmetrise(doubles(0.9), doubles(0.5))) == pytest.approx(0.7)


def test_mirror_descent_step_is_the_one_inpo_fits():
    new = mirror_descent_step(doubles(0.4, 0.35, 0.25), REF, GAME, eta=0.5, tau=0.2)
    assert close(new, 0.490775, 0.260222, 0.249003)
    # h(y, y') = [P(y > pi_t) - P(y' > pi_t)] / eta for every pair
    h = new.log() - 0.4 * REF.log() - 0.6 * doubles(0.4, 0.35, 0.25).log()
    wins = GAME @ doubles(0.4, 0.35, 0.25)
    torch.testing.assert_close(h[:, None] - h[None, :], (wins[:, None] - wins[None, :]) / 0.5)


def test_mirror_prox_contracts_at_the_papers_rate():
    policy = REF
    distances = []
    for _ in range(400):
        policy = mirror_prox_step(policy, REF, GAME)[1]
    star = policy
    assert close(star, 0.522295, 0.222794, 0.254911)
    # a fixed point of its best response
    torch.testing.assert_close(torch.softmax(REF.log() + GAME @ star / 0.5, 0), star)
    policy = REF
    for step in range(6):
        distances.append(float((star * (star / policy).log()).sum()))
        half, policy = mirror_prox_step(policy, REF, GAME)
        if step == 0:
            assert close(half, 0.528069, 0.254271, 0.217660)
            assert close(policy, 0.521179, 0.254974, 0.223846)
    assert close(doubles(*distances), 0.018337, 0.004185, 0.000972, 0.000227, 0.000053, 0.000012)
    assert all(later / earlier <= 1 / (1 + 2 * 0.5) for earlier, later in itertools.pairwise(distances))


def test_an_indifferent_preference_leaves_the_reference():
    policy = doubles(0.8, 0.1, 0.1)
    for _ in range(200):
        policy = mirror_prox_step(policy, REF, torch.full((3, 3), 0.5).double())[1]
    torch.testing.assert_close(policy, REF)


def test_superhf_keeps_the_best_of_each_prompt():
    reward = doubles(0.1, 1.7, -0.4, 0.9)
    group = torch.tensor([7, 7, 7, 7])
    assert keep_best(reward, group).nonzero().tolist() == [[1]]
    assert keep_best(reward, group, top_k=2).nonzero().tolist() == [[1], [3]]
    mixed = keep_best(doubles(1, 5, 5, math.nan, 2), torch.tensor([1, 2, 2, 3, 1]))
    assert mixed.tolist() == [False, True, False, False, True]  # the first of a tie; NaN never


def test_paced_weights_peak_where_the_student_half_succeeds():
    p = doubles(0, 1, 4, 7, 8) / 8
    assert close(paced_weight(p, normalise="none"), 0, 0.109375, 0.25, 0.109375, 0)
    assert close(paced_weight(p, alpha=2.0, normalise="none"), 0, 0.013672, 0.125, 0.095703, 0)
    assert close(paced_weight(p), 0, 1.166667, 2.666667, 1.166667, 0)
    losses = doubles(1.2, 0.9, 0.7, 0.5, 0.1)
    assert float((paced_weight(p, normalise="none") * losses).mean()) == pytest.approx(0.065625)
    assert float((paced_weight(p, normalise="sum1") * losses).sum()) == pytest.approx(0.7)
    assert close(paced_weight(p, alpha=0.0, beta=0.0), 1, 1, 1, 1, 1)  # unweighted distillation, 0^0 = 1
    assert close(paced_weight(doubles(0, 1)), 0, 0)  # nothing to learn from, and nothing divided by 0
    grid = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert float(grid[paced_weight(grid, alpha=2.0).argmax()]) == pytest.approx(2 / 3, abs=1e-3)
    assert close(smoothed_pass_rate(doubles(0, 8), 8), 0.5 / 9, 8.5 / 9)
    with pytest.raises(ValueError, match="outside"):
        paced_weight(doubles(1.5))


def test_spos_degree_loss_is_a_cross_entropy():
    logits = torch.tensor(
        [[2.0, 0.5, -0.5, -1.0], [0.2, 0.9, 0.4, -0.3], [-0.6, 0.1, 0.3, 1.1]], dtype=torch.float64
    )
    degree = torch.tensor([0, 1, 3])
    assert close(spo_degree(logits, degree), 0.303803, 0.877263, 0.693093)
    # with DPO's mean 0.687142 and weight 0.1: 0.749614
    assert 0.6871424671 + 0.1 * float(spo_degree(logits, degree).mean()) == pytest.approx(0.749614, abs=1e-6)
    assert close(spo_degree(torch.zeros(2, 4).double(), torch.tensor([0, 3])), math.log(4), math.log(4))


def fitted(loss: Callable[..., ExampleLoss], centre: Tensor, opponent: Tensor, **settings: float) -> Tensor:
    """(3,) the policy that minimises the loss over all pairs of two independent samples of ``opponent``, each
    verdict as likely as it is.

    A square in the three logits: one Newton step from anywhere lands on the minimum (up to the constant that
    softmax removes).
    """
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    # first is drawn, second is drawn, first wins
    weight = opponent[first] * opponent[second] * GAME[first, second]
    facts = [
        CompletionFacts(torch.ones(9), ref_logp=REF.log()[side], previous_logp=centre.log()[side])
        for side in (first, second)
    ]
    batch = PairBatch(*facts, prompt=torch.arange(9))

    def total(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(0)
        return (
            weight
            * loss(
                PolicyPairs(PolicySequences(logp[first]), PolicySequences(logp[second])), batch, **settings
            ).values
        ).sum()

    start = torch.zeros(3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(total, start)
    curvature = torch.autograd.functional.hessian(total, start)
    return torch.softmax(start - torch.linalg.pinv(curvature) @ slope, 0)


def test_the_losses_minimum_over_sampled_pairs_is_the_step_they_stand_for():
    centre = doubles(0.4, 0.35, 0.25)
    opponent = doubles(0.2, 0.2, 0.6)
    torch.testing.assert_close(
        fitted(inpo, centre, centre, eta=0.5, tau=0.2),
        mirror_descent_step(centre, REF, GAME, eta=0.5, tau=0.2),
    )
    for eta, beta in ((2.0, 0.5), (1.0, 0.1)):
        # (1 + eta beta) ln pi = eta P(. > opponent) + eta beta ln pi_ref + ln centre + constant
        expected = torch.softmax(
            (eta * (GAME @ opponent) + eta * beta * REF.log() + centre.log()) / (1 + eta * beta), 0
        )
        torch.testing.assert_close(fitted(nash_mp, centre, opponent, eta=eta, beta=beta), expected)


def test_iterating_the_losses_reaches_the_regularised_nash_policy():
    star = REF
    for _ in range(400):
        star = mirror_prox_step(star, REF, GAME, eta=2.0, beta=0.5)[1]
    policy = REF
    distances = []
    for _ in range(16):  # two steps from one centre, as train.previous_every 2 makes them
        centre = policy
        half = fitted(nash_mp, centre, centre, eta=2.0, beta=0.5)
        policy = fitted(nash_mp, centre, half, eta=2.0, beta=0.5)
        distances.append(float((star * (star / policy).log()).sum()))
    # 1 / (1 + 2 beta)
    assert all(later / earlier <= 0.5 for earlier, later in itertools.pairwise(distances[:6]))
    torch.testing.assert_close(policy, star, atol=1e-4, rtol=0)
    policy = REF
    for _ in range(
        300
    ):  # every step its own centre; tau is the weight of the KL, and a small step size is a large eta
        policy = fitted(inpo, policy, policy, eta=2.0, tau=0.5)
    torch.testing.assert_close(policy, star, atol=1e-6, rtol=0)


def test_nash_mp_refuses_steps_beyond_its_guarantee():
    batch = PairBatch(
        *(
            CompletionFacts(torch.ones(1), ref_logp=torch.zeros(1), previous_logp=torch.zeros(1))
            for _ in "cr"
        ),
        torch.zeros(1),
    )
    policy = PolicyPairs(PolicySequences(torch.zeros(1)), PolicySequences(torch.zeros(1)))
    for settings in ({"eta": 2.1}, {"eta": 0.0}, {"beta": 0.0}):
        with pytest.raises(ValueError, match="0 < eta <= 2"):
            nash_mp(policy, batch, **settings)
