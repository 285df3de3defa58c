"""What every pairwise loss owes: its constant at the reference, invariances, gradients in closed
form, finite extremes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.loss.preference.dpo import soft_logistic
from rltrain.loss.preference.f_dpo import divergence_score
from rltrain.loss.preference.ratio import count_wins
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.types.preference import (
    CompletionFacts,
    ExampleLoss,
    PairBatch,
    PolicyPairs,
    PolicySequences,
    RewardPairs,
)

N = 6
LN2 = math.log(2)


def doubles(*size: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_pairs(seed: int = 0) -> tuple[PolicyPairs, PairBatch]:
    def side(offset: int) -> tuple[PolicySequences, CompletionFacts]:
        logp = -doubles(N, seed=seed + offset).abs() - 1
        length = torch.arange(2, N + 2) + offset
        facts = CompletionFacts(length, logp + doubles(N, seed=seed + offset + 1), logp - 0.3, logp.clone())
        return PolicySequences(logp.requires_grad_()), facts

    (chosen, chosen_facts), (rejected, rejected_facts) = side(10), side(20)
    columns = {"is_target_language": torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)}
    margin = doubles(N, seed=3).abs()
    p_chosen = torch.sigmoid(doubles(N, seed=4))
    batch = PairBatch(
        chosen_facts, rejected_facts, torch.arange(N), margin=margin, p_chosen=p_chosen, columns=columns
    )
    return PolicyPairs(chosen, rejected), batch


def run(name: str, policy: PolicyPairs, batch: PairBatch, **hp: Any) -> ExampleLoss:
    loss = PREFERENCE_LOSSES.bind(name, hp)
    return loss(policy, with_batch_statistics(batch, loss))


def at_the_reference(policy: PolicyPairs, batch: PairBatch) -> PairBatch:
    def settle(facts: CompletionFacts, sequences: PolicySequences) -> CompletionFacts:
        here = sequences.logp.detach()
        return dataclasses.replace(facts, ref_logp=here, previous_logp=here, logp_now=here)

    return dataclasses.replace(
        batch, chosen=settle(batch.chosen, policy.chosen), rejected=settle(batch.rejected, policy.rejected)
    )


def margin_of(policy: PolicyPairs, batch: PairBatch) -> Tensor:
    """Delta, (N,)."""
    assert batch.chosen.ref_logp is not None and batch.rejected.ref_logp is not None
    return (
        policy.chosen.logp - batch.chosen.ref_logp - policy.rejected.logp + batch.rejected.ref_logp
    ).detach()


LOG_PROB_PAIRS = [
    name
    for name in PREFERENCE_LOSSES.names()
    if {"pairs"} <= (traits := PREFERENCE_LOSSES.spec(name).traits) and "scalar_head" not in traits
]
HP: dict[str, dict[str, Any]] = {
    "mmpo": {"gamma": 0.7},
    "clo": {"sft_share": 0.0},
    "rpo": {"sft_weight": 0.0},
}


@pytest.mark.parametrize(
    ("name", "hp", "constant"),
    [
        ("dpo", {}, LN2),
        ("cdpo", {}, LN2),
        ("robust_dpo", {}, LN2),  # [-(1 - e) + e] ln(1/2) / (1 - 2e)
        ("hinge", {}, 1.0),
        ("ipo", {"tau": 0.2}, 6.25),  # 1 / (4 tau^2) = 1 / 0.16
        ("ipo", {"tau": 0.2, "log_ratio": "per_token"}, 6.25),
        ("dpo_length_normalised", {}, LN2),
        ("h_dpo", {}, LN2),
        ("f_dpo", {"divergence": "reverse_kl"}, LN2),
        ("f_dpo", {"divergence": "forward_kl"}, LN2),
        ("f_dpo", {"divergence": "js"}, LN2),
        ("f_dpo", {"divergence": "alpha", "alpha_forward": 0.3}, LN2),
        ("mmpo", {"gamma": 0.3}, LN2),  # (p + 1 - p) ln 2
        ("osp", {}, LN2),
        ("rpo", {"sft_weight": 0.0}, LN2),
        ("napo", {}, 0.5),  # M = 0 gives q = 1, and 1 - sigmoid(0)
        ("napo_fixed", {"q": 0.5}, 2 * (1 - math.sqrt(0.5))),
        ("inpo", {"eta": 0.2, "tau": 0.1}, 6.25),  # 1 / (4 eta^2)
        ("nash_mp", {}, 0.25),  # inpo with eta = beta + 1 / eta = 0.5 + 0.5
        ("clo", {"sft_share": 0.0}, LN2),
        ("nca", {}, 2 * LN2),
        ("exo", {"flip_rate": 0.2}, -LN2 - 0.5 * math.log(0.16)),  # q = 1/2: ln 1/2 - ln(.8 .2) / 2
        ("sppo", {"beta": 0.5}, 2.0),  # 2 / (2 beta)^2
        ("apo", {}, 1.0),
        ("apo", {"form": "down"}, 1.0),
        ("discopop", {}, LN2 / 2 + 0.5),  # half of ln 2 and half of e^0
        ("bco_pair", {}, 2 * LN2),
        ("aot", {}, LN2),
        ("aot_unpaired", {}, LN2),
    ],
)
def test_a_policy_at_its_reference_has_the_stated_loss(name: str, hp: dict[str, Any], constant: float):
    policy, batch = random_pairs()
    values = run(name, policy, at_the_reference(policy, batch), **hp).values
    torch.testing.assert_close(values, torch.full_like(values, constant), rtol=0, atol=1e-12)


def test_the_list_of_constants_has_every_pairwise_loss():
    listed = {
        mark.args[1][i][0]
        for mark in test_a_policy_at_its_reference_has_the_stated_loss.pytestmark
        for i in range(len(mark.args[1]))
    }
    without_reference = {"dpo_reference_free", "simpo", "cpo", "orpo"}
    assert listed | without_reference | {"sppo_soft"} == set(LOG_PROB_PAIRS)  # its constant is the data's


# aot_unpaired has the gradient of a sum of rows, which the known answers compare
@pytest.mark.parametrize("name", [name for name in LOG_PROB_PAIRS if name != "aot_unpaired"])
def test_gradcheck_values_and_only_the_policy_has_a_gradient(name: str):
    policy, batch = random_pairs()

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        return run(
            name, PolicyPairs(PolicySequences(chosen), PolicySequences(rejected)), batch, **HP.get(name, {})
        ).values

    assert torch.autograd.gradcheck(total, (policy.chosen.logp, policy.rejected.logp))
    for facts in (batch.chosen, batch.rejected):
        for frozen in (facts.ref_logp, facts.previous_logp, facts.logp_now):
            frozen.requires_grad_()  # even where the caller forgot to detach
    run(name, policy, batch, **HP.get(name, {})).values.sum().backward()
    assert all(
        facts.ref_logp.grad is None and facts.previous_logp.grad is None
        for facts in (batch.chosen, batch.rejected)
    )
    assert policy.chosen.logp.grad is not None


@pytest.mark.parametrize("name", LOG_PROB_PAIRS)
def test_a_row_does_not_see_the_others(name: str):
    # micro-batches: the statistics stay the whole batch's, so that any cut gives the same values
    policy, batch = random_pairs()
    loss = PREFERENCE_LOSSES.bind(name, HP.get(name, {}))
    whole_batch = with_batch_statistics(batch, loss)
    all_values = loss(policy, whole_batch).values
    for index in (torch.tensor([4]), torch.tensor([5, 0, 2])):
        part = PolicyPairs(
            PolicySequences(policy.chosen.logp[index]), PolicySequences(policy.rejected.logp[index])
        )
        values = loss(part, whole_batch.rows(index)).values
        torch.testing.assert_close(values, all_values[index], rtol=0, atol=0)


@pytest.mark.parametrize("name", LOG_PROB_PAIRS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_are_finite_in_value_and_gradient(name: str, gap: float):
    logp = (
        torch.tensor([-2.0, -1e4, -3e4], requires_grad=True),
        torch.tensor([-2.0, -1e4, -3e4], requires_grad=True),
    )

    def facts(sign: int) -> CompletionFacts:
        return CompletionFacts(
            torch.tensor([3, 700, 900]), torch.full((3,), sign * gap), torch.full((3,), -5.0), torch.zeros(3)
        )

    columns = {"is_target_language": torch.tensor([1.0, 0.0, 0.0])}
    unit = torch.ones(3)
    batch = PairBatch(facts(1), facts(-1), torch.arange(3), margin=unit, p_chosen=0.9 * unit, columns=columns)
    result = run(
        name, PolicyPairs(PolicySequences(logp[0]), PolicySequences(logp[1])), batch, **HP.get(name, {})
    )
    result.values.sum().backward()
    assert result.values.isfinite().all()
    assert logp[0].grad.isfinite().all() and logp[1].grad.isfinite().all()
    assert all(values.isfinite().all() and not values.requires_grad for values in result.metrics.values())


@pytest.mark.parametrize(
    ("name", "hp", "slope"),
    [  # dL / d logp_chosen, written out
        ("dpo", {"beta": 0.3}, lambda z: -0.3 * torch.sigmoid(-z)),
        ("cdpo", {"beta": 0.3, "flip_rate": 0.1}, lambda z: 0.3 * (torch.sigmoid(z) - 0.9)),
        (
            "robust_dpo",
            {"beta": 0.3},
            lambda z: 0.3 * (-0.9 * torch.sigmoid(-z) - 0.1 * torch.sigmoid(z)) / 0.8,
        ),
        ("hinge", {"beta": 0.3}, lambda z: -0.3 * (z < 1).double()),
        ("ipo", {"tau": 0.2}, lambda z: 2 * (z / 0.3 - 2.5)),
        ("rpo", {"beta": 0.3, "sft_weight": 0.05}, lambda z: -0.3 * (torch.sigmoid(-z) + 0.05)),
        ("napo_fixed", {"beta": 0.3, "q": 0.4}, lambda z: -0.3 * torch.sigmoid(z) ** 0.4 * torch.sigmoid(-z)),
    ],
)
def test_the_gradient_is_the_closed_form(name: str, hp: dict[str, Any], slope: Any):
    policy, batch = random_pairs()
    run(name, policy, batch, **hp).values.sum().backward()
    torch.testing.assert_close(
        policy.chosen.logp.grad, slope(0.3 * margin_of(policy, batch)), rtol=1e-10, atol=1e-12
    )


def test_soft_targets_pull_the_margin_to_gamma_times_the_datas():
    # dL/dz = sigmoid(z) - p is 0 at z = gamma m, and the loss there is the entropy of p
    m = doubles(N, seed=9)
    z = (0.7 * m).requires_grad_()
    p = torch.sigmoid(0.7 * m)
    values = soft_logistic(z, p)
    values.sum().backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(m), rtol=0, atol=1e-15)
    torch.testing.assert_close(values.detach(), -(p * p.log() + (1 - p) * (1 - p).log()))


# equivalences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hp"),
    [
        ("h_dpo", {"alpha": 1.0}),
        ("f_dpo", {"divergence": "reverse_kl"}),
        ("rpo", {"sft_weight": 0.0, "beta": 0.1}),
        ("clo", {"sft_share": 0.0}),
        ("cdpo", {"flip_rate": 0.0}),
        ("robust_dpo", {"flip_rate": 0.0}),
    ],
)
def test_it_equals_dpo_bit_for_bit(name: str, hp: dict[str, Any]):
    policy, batch = random_pairs()
    assert torch.equal(run(name, policy, batch, **hp).values, run("dpo", policy, batch).values)


@pytest.mark.parametrize(
    ("name", "hp", "tolerance"),
    [
        ("napo_fixed", {"q": 1e-8}, 1e-6),
        ("f_dpo", {"divergence": "alpha", "alpha_forward": 1e-9}, 1e-7),
    ],
)
def test_it_tends_to_dpo(name: str, hp: dict[str, Any], tolerance: float):
    policy, batch = random_pairs()
    torch.testing.assert_close(
        run(name, policy, batch, **hp).values, run("dpo", policy, batch).values, rtol=0, atol=tolerance
    )


def test_certain_preferences_are_dpo():
    policy, batch = random_pairs()
    dpo = run("dpo", policy, batch).values
    certain = dataclasses.replace(
        batch, p_chosen=torch.ones(N).double(), margin=torch.full((N,), 1e6).double()
    )
    torch.testing.assert_close(run("osp", policy, certain).values, dpo)
    torch.testing.assert_close(run("mmpo", policy, certain, beta=0.1, gamma=1.0).values, dpo)


def test_a_constant_target_is_cdpo():
    policy, batch = random_pairs()
    batch = dataclasses.replace(
        batch, p_chosen=torch.full((N,), 0.9).double(), margin=torch.full((N,), math.log(9) / 0.7).double()
    )
    cdpo = run("cdpo", policy, batch, flip_rate=0.1).values
    torch.testing.assert_close(run("osp", policy, batch).values, cdpo)
    # sigmoid(ln 9) = 0.9
    torch.testing.assert_close(run("mmpo", policy, batch, beta=0.1, gamma=0.7).values, cdpo)


def test_osp_is_mmpo_with_its_targets_written_out():
    policy, batch = random_pairs()
    stated = dataclasses.replace(batch, p_chosen=torch.sigmoid(0.7 * batch.margin))
    torch.testing.assert_close(
        run("osp", policy, stated).values, run("mmpo", policy, batch, beta=0.1, gamma=0.7).values
    )


def test_alpha_one_is_the_forward_kl_and_trl_counts_from_the_other_end():
    policy, batch = random_pairs()
    forward = run("f_dpo", policy, batch, divergence="forward_kl").values
    torch.testing.assert_close(
        run("f_dpo", policy, batch, divergence="alpha", alpha_forward=1.0).values, forward
    )
    # TRL: f'(rho) = (rho^(a-1) - 1) / (a - 1) with a = 1 - alpha_forward
    u = margin_of(policy, batch), policy.chosen.logp.detach() - batch.chosen.ref_logp
    chosen = u[1]
    rejected = u[1] - u[0]
    a = 0.7
    trl = -torch.nn.functional.logsigmoid(
        0.1 * (torch.expm1((a - 1) * chosen) - torch.expm1((a - 1) * rejected)) / (a - 1)
    )
    torch.testing.assert_close(
        run("f_dpo", policy, batch, divergence="alpha", alpha_forward=0.3).values.detach(), trl
    )


def test_inpo_from_the_reference_is_ipo():
    policy, batch = random_pairs()
    sides = {
        name: dataclasses.replace(side, previous_logp=side.ref_logp)
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected))
    }
    batch = dataclasses.replace(batch, **sides)
    torch.testing.assert_close(
        run("inpo", policy, batch, eta=0.2, tau=0.05).values, run("ipo", policy, batch, tau=0.2).values
    )


def test_napo_at_one_is_the_mean_absolute_error():
    policy, batch = random_pairs()
    values = run("napo_fixed", policy, batch, q=1.0).values.detach()
    torch.testing.assert_close(values, torch.sigmoid(-0.1 * margin_of(policy, batch)))


# invariances ------------------------------------------------------------------------------------------------


def test_robust_dpo_is_unbiased_under_flips():
    # (1 - e) robust(z) + e robust(-z) = dpo(z)
    policy, batch = random_pairs()
    flipped = (
        PolicyPairs(policy.rejected, policy.chosen),
        dataclasses.replace(batch, chosen=batch.rejected, rejected=batch.chosen),
    )
    mixed = (
        0.7 * run("robust_dpo", policy, batch, flip_rate=0.3).values
        + 0.3 * run("robust_dpo", *flipped, flip_rate=0.3).values
    )
    torch.testing.assert_close(mixed, run("dpo", policy, batch).values)


def test_swapping_a_pair_and_negating_its_margin_changes_nothing():
    policy, batch = random_pairs()
    swapped = dataclasses.replace(batch, chosen=batch.rejected, rejected=batch.chosen, margin=-batch.margin)
    torch.testing.assert_close(
        run("mmpo", PolicyPairs(policy.rejected, policy.chosen), swapped, gamma=0.7).values,
        run("mmpo", policy, batch, gamma=0.7).values,
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LOG_PROB_PAIRS
        if name not in ("nca", "f_dpo", "ipo", "dpo_length_normalised", "napo", "clo", "rpo")
        and name not in ("simpo", "cpo", "orpo", "sppo", "sppo_soft", "apo", "bco_pair", "aot_unpaired")
    ],
)
def test_a_constant_on_both_log_probs_of_a_pair_changes_nothing(name: str):
    policy, batch = random_pairs()
    shifted = PolicyPairs(
        PolicySequences(policy.chosen.logp + 3.5), PolicySequences(policy.rejected.logp + 3.5)
    )
    hp = HP.get(name, {})
    torch.testing.assert_close(run(name, shifted, batch, **hp).values, run(name, policy, batch, **hp).values)


def test_f_dpo_scores_rise_with_the_log_ratio():
    u = torch.linspace(-30, 30, 121, dtype=torch.float64)
    for divergence, alpha in (("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3)):
        score, clamped = divergence_score(u, divergence, alpha)
        assert (score.diff() >= 0).all() and not clamped.any()


def test_f_dpo_counts_rows_that_it_clamps_and_gives_them_no_gradient():
    # forward KL: exp(-u) at u = -90 would be exp(90), past float32
    chosen = torch.tensor([-90.0, 0.0], requires_grad=True)
    facts = CompletionFacts(torch.tensor([5, 5]), torch.zeros(2))
    batch = PairBatch(facts, facts, torch.arange(2))
    result = run(
        "f_dpo",
        PolicyPairs(PolicySequences(chosen), PolicySequences(torch.zeros(2))),
        batch,
        divergence="forward_kl",
    )
    result.values.sum().backward()
    assert result.metrics["clamped"].tolist() == [1.0, 0.0]
    assert chosen.grad[0] == 0 and chosen.grad[1] != 0


def test_h_dpos_optimum_gives_the_rewards_back_and_its_entropy_rises_with_alpha():
    # on three answers, pi* ~ pi_ref^(1/alpha) exp(r / (alpha beta)): implicit rewards differ exactly as the
    # rewards do
    ref = torch.tensor([0.5, 0.3, 0.2]).double()
    r = torch.tensor([0.05, 0.2, 0.0]).double()
    beta = 0.1
    entropies = []
    for alpha in (0.8, 0.9, 1.0, 1.2):
        best = torch.softmax((ref.log() + r / beta) / alpha, 0)
        first = torch.tensor([0, 1, 2])
        second = torch.tensor([1, 2, 0])
        facts = [CompletionFacts(torch.ones(3).long(), ref.log()[side]) for side in (first, second)]
        policy = PolicyPairs(PolicySequences(best.log()[first]), PolicySequences(best.log()[second]))
        metrics = run(
            "h_dpo", policy, PairBatch(facts[0], facts[1], torch.zeros(3).long()), alpha=alpha, beta=beta
        ).metrics
        torch.testing.assert_close(metrics["margin"], r[first] - r[second])
        entropies.append(float(-(best * best.log()).sum()))
    assert entropies == sorted(entropies)


def test_rpos_gradient_never_falls_below_its_imitation_weight():
    # dL/dlogp_w = -beta (sigmoid(-z) + eta), also where the margin is saturated
    chosen = torch.tensor([500.0], dtype=torch.float64, requires_grad=True)
    facts = CompletionFacts(torch.tensor([4]), torch.zeros(1).double())
    batch = PairBatch(facts, facts, torch.zeros(1).long())
    run(
        "rpo", PolicyPairs(PolicySequences(chosen), PolicySequences(torch.zeros(1).double())), batch, beta=0.1
    ).values.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.1 * 0.005]).double())


def test_clo_without_target_rows_is_its_preference_part():
    policy, batch = random_pairs()
    none = dataclasses.replace(batch, columns={"is_target_language": torch.zeros(N).double()})
    torch.testing.assert_close(
        run("clo", policy, none, sft_share=0.25).values, 0.75 * run("dpo", policy, batch).values
    )


def test_clo_of_imitation_only_has_no_gradient_from_english_rows():
    policy, batch = random_pairs()
    run("clo", policy, batch, sft_share=1.0).values.sum().backward()
    english = batch.columns["is_target_language"] == 0
    assert (policy.chosen.logp.grad[english] == 0).all() and (policy.chosen.logp.grad[~english] < 0).all()
    assert (policy.rejected.logp.grad == 0).all()


def test_both_sides_of_the_metrics():
    policy, batch = random_pairs()
    metrics = run("dpo", policy, batch, beta=0.5).metrics
    torch.testing.assert_close(metrics["margin"], 0.5 * margin_of(policy, batch))
    assert torch.equal(metrics["accuracy"], (margin_of(policy, batch) > 0).double())
    assert torch.equal(metrics["logp_chosen"], policy.chosen.logp.detach())
    tie = at_the_reference(policy, batch)
    assert set(run("dpo", policy, tie).metrics["accuracy"].tolist()) == {0.5}  # neither side is preferred


# bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mmpo", "bradley_terry_margin", "bradley_terry_mmpo"])
def test_a_missing_margin_is_an_error(name: str):
    policy, batch = random_pairs()
    batch = dataclasses.replace(batch, margin=None)
    heads = RewardPairs(policy.chosen.logp, policy.rejected.logp)
    loss = PREFERENCE_LOSSES.bind(name, {} if name == "bradley_terry_margin" else {"gamma": 1.0})
    with pytest.raises(ValueError, match=r"no margins.*score_chosen"):
        loss(heads if "scalar_head" in loss.spec.traits else policy, batch)


def test_a_margin_that_is_not_a_number_is_an_error():
    policy, batch = random_pairs()
    batch.margin[2] = torch.nan
    with pytest.raises(ValueError, match="1 of 6 pairs have no finite margin"):
        run("mmpo", policy, batch, gamma=1.0)


def test_mmpo_has_no_gamma_of_its_own():
    policy, batch = random_pairs()
    with pytest.raises(ValueError, match="gamma has no default"):
        run("mmpo", policy, batch)


@pytest.mark.parametrize(
    ("name", "hp", "says"),
    [
        ("h_dpo", {"alpha": 0.0}, "alpha is 0.0"),
        ("f_dpo", {"divergence": "alpha", "alpha_forward": 0.0}, "alpha_forward is 0.0"),
        ("robust_dpo", {"flip_rate": 0.5}, "flip_rate is 0.5"),
        ("inpo", {"eta": 0.1, "tau": 0.2}, "tau is 0.2 and eta 0.1"),
        ("napo_fixed", {"q": 0.0}, "q is 0.0"),
    ],
)
def test_hyperparameters_outside_their_range_are_refused(name: str, hp: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        run(name, *random_pairs(), **hp)


def test_a_missing_reference_or_previous_policy_is_an_error():
    policy, batch = random_pairs()
    bare_batch = dataclasses.replace(batch, chosen=CompletionFacts(batch.chosen.length))
    with pytest.raises(ValueError, match="ref_logp was not computed"):
        run("dpo", policy, bare_batch)
    with pytest.raises(ValueError, match="previous_logp was not computed"):
        run("inpo", policy, bare_batch)
    with pytest.raises(ValueError, match="statistic of the current policy needs"):
        run("napo", policy, bare_batch)


def test_a_probability_outside_the_unit_interval_is_an_error():
    policy, batch = random_pairs()
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        run("osp", policy, dataclasses.replace(batch, p_chosen=batch.p_chosen + 1))


def test_what_rounding_leaves_of_a_margin_is_a_tie() -> None:
    """A policy that equals its reference is right in one half, not in the share that rounding favours."""
    margin = torch.tensor([1e-7, -1e-7, 0.0, 1e-4, -1e-4, float("nan")])
    assert count_wins(margin).tolist() == [0.5, 0.5, 0.5, 1.0, 0.0, 0.0]
