"""Losses on completions judged one by one, reward models, and statistics over the optimizer batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rltrain.loss.preference import PREFERENCE_LOSSES, STATISTICS, statistics_of, tensors_of
from rltrain.loss.preference.dco import coverage
from rltrain.loss.preference.kto import class_weight_advice, class_weight_window, mismatched_partner
from rltrain.loss.preference.objective import PreferenceObjective
from rltrain.loss.preference.statistics import with_batch_statistics
from rltrain.types.preference import (
    CompletionFacts,
    ExampleLoss,
    ExampleTotals,
    LabelBatch,
    PairBatch,
    PolicySequences,
    RewardPairs,
)

N = 6
LN2 = math.log(2)
LABELS = [name for name in PREFERENCE_LOSSES.names() if "labels" in PREFERENCE_LOSSES.spec(name).traits]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(seed: int = 0) -> tuple[PolicySequences, LabelBatch]:
    logp = -noise(N, seed).abs() * 3 - 0.5
    facts = CompletionFacts(
        torch.arange(3, N + 3), logp + noise(N, seed + 1), logp_now=logp.clone() + 0.1 * noise(N, seed + 4)
    )
    mismatched = CompletionFacts(
        torch.arange(3, N + 3), noise(N, seed + 2) - 3, logp_now=noise(N, seed + 3) - 2.5
    )
    label = doubles(1, 0, 1, 1, 0, 0)
    prompt = torch.tensor([4, 4, 4, 9, 9, 2])
    columns = {"pass_rate": doubles(0.0, 0.05, 0.5, 1.0, 0.01, 0.2)}
    return PolicySequences(logp.requires_grad_()), LabelBatch(
        facts, prompt, label, mismatched, columns=columns
    )


def policy_for(name: str, policy: PolicySequences) -> Any:
    return policy.logp if "scalar_head" in PREFERENCE_LOSSES.spec(name).traits else policy


def run(name: str, policy: Any, batch: LabelBatch, **hp: Any) -> ExampleLoss:
    loss = PREFERENCE_LOSSES.bind(name, hp)
    return loss(policy, with_batch_statistics(batch, loss))


def at_the_reference(policy: PolicySequences, batch: LabelBatch) -> LabelBatch:
    return dataclasses.replace(
        batch,
        completion=dataclasses.replace(batch.completion, ref_logp=policy.logp.detach()),
        mismatched=dataclasses.replace(batch.mismatched, ref_logp=batch.mismatched.logp_now),
    )


@pytest.mark.parametrize(
    ("name", "hp", "constant"),
    [
        ("kto", {}, 0.5),
        ("kto", {"weight_desirable": 1.5, "weight_undesirable": 1.5}, 0.75),
        ("implicit_prm_ce", {}, LN2),
    ],
)
def test_a_policy_at_its_reference_has_the_stated_loss(name: str, hp: dict[str, float], constant: float):
    policy, batch = random_labels()
    values = run(name, policy, at_the_reference(policy, batch), **hp).values
    torch.testing.assert_close(values, torch.full_like(values, constant), rtol=0, atol=1e-12)


def test_nca_over_whole_groups_at_the_reference():
    # mean over the answers of one prompt: sum_i w_i ln 2 + ln 2 = 2 ln 2
    policy, batch = random_labels()
    values = run("nca_group", policy, at_the_reference(policy, batch)).values.detach()
    for prompt in (2, 4, 9):
        assert float(values[batch.prompt == prompt].mean()) == pytest.approx(2 * LN2, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LABELS if not name.startswith("dco")])
def test_gradcheck_and_the_frozen_side_has_no_gradient(name: str):
    policy, batch = random_labels()
    assert torch.autograd.gradcheck(
        lambda logp: run(name, policy_for(name, PolicySequences(logp)), batch).values, policy.logp
    )
    frozen = [batch.completion.ref_logp, batch.mismatched.logp_now, batch.mismatched.ref_logp]
    for tensor in frozen:
        tensor.requires_grad_()
    run(name, policy_for(name, policy), batch).values.sum().backward()
    assert all(tensor.grad is None for tensor in frozen) and policy.logp.grad is not None


@pytest.mark.parametrize("name", LABELS)
def test_a_row_does_not_see_the_others(name: str):
    policy, batch = random_labels()
    loss = PREFERENCE_LOSSES.bind(name)
    whole_batch = with_batch_statistics(batch, loss)
    all_values = loss(policy_for(name, policy), whole_batch).values
    for index in (torch.tensor([4]), torch.tensor([5, 0, 2])):
        part = policy_for(name, PolicySequences(policy.logp[index]))
        values = loss(part, whole_batch.rows(index)).values
        torch.testing.assert_close(values, all_values[index], rtol=0, atol=0)


@pytest.mark.parametrize("name", LABELS)
def test_extreme_log_ratios_are_finite_in_value_and_gradient(name: str):
    logp = torch.tensor([-1e4, -1e4, -1e-4, -3.0], requires_grad=True)
    facts = CompletionFacts(
        torch.tensor([900, 900, 2, 3]), torch.tensor([0.0, -2e4, -1e4, -3.0]), logp_now=logp.detach()
    )
    mismatched = CompletionFacts(torch.ones(4).long(), torch.zeros(4), logp_now=torch.full((4,), 1e4))
    columns = {"pass_rate": torch.tensor([0.0, 1.0, 1e-9, 0.5])}
    prompt = torch.tensor([0, 0, 1, 1])
    label = torch.tensor([1.0, 0.0, 1.0, 0.0])
    batch = LabelBatch(facts, prompt, label, mismatched, columns=columns)
    result = run(name, policy_for(name, PolicySequences(logp)), batch)
    result.values.sum().backward()
    assert result.values.isfinite().all() and logp.grad.isfinite().all()
    assert all(values.isfinite().all() and not values.requires_grad for values in result.metrics.values())


# KTO --------------------------------------------------------------------------------------------------------


def test_z0_is_reduced_first_and_clamped_last():
    # k = [-.6, -.2] on one rank and [.1, .3] on the other: mean -0.1, clamped 0; clamping each rank's mean
    # first gives 0.1
    def z0(*k: float) -> float:
        facts = CompletionFacts(torch.ones(len(k)).long(), torch.zeros(len(k)).double(), logp_now=doubles(*k))
        batch = LabelBatch(facts, torch.arange(len(k)), torch.ones(len(k)).double(), facts)
        return float(STATISTICS.bind("z0")(batch))

    assert z0(-0.6, -0.2, 0.1, 0.3) == 0.0
    assert (z0(-0.6, -0.2) + z0(0.1, 0.3)) / 2 == pytest.approx(0.1)
    assert z0(0.5, 0.1) == pytest.approx(0.3)


def test_kto_lies_between_zero_and_its_weight_and_weights_touch_their_class_only():
    policy, batch = random_labels()
    plain = run("kto", policy, batch).values
    heavy = run("kto", policy, batch, weight_desirable=1.4).values
    assert ((plain > 0) & (plain < 1)).all()
    torch.testing.assert_close(heavy, torch.where(batch.label > 0, 1.4 * plain, plain))


def test_ktos_gradient_is_the_closed_form():
    # dL/dlogp = -+ weight beta v (1 - v)
    policy, batch = random_labels()
    run("kto", policy, batch, beta=0.4, weight_undesirable=1.2).values.sum().backward()
    z0 = (batch.mismatched.logp_now - batch.mismatched.ref_logp).mean().clamp(min=0)
    v = torch.sigmoid(0.4 * (policy.logp.detach() - batch.completion.ref_logp - z0))
    sign = torch.where(batch.label > 0, -1.0, 1.2)
    torch.testing.assert_close(policy.logp.grad, sign * 0.4 * v * (1 - v))


def test_kto_of_one_class_is_finite_and_labels_may_be_true_and_false():
    policy, batch = random_labels()
    plain = run("kto", policy, batch).values
    assert torch.equal(run("kto", policy, dataclasses.replace(batch, label=batch.label > 0.5)).values, plain)
    for kind in (0.0, 1.0):
        result = run("kto", policy, dataclasses.replace(batch, label=torch.full((N,), kind).double()))
        assert result.values.isfinite().all() and all(
            shown.isfinite().all() for shown in result.metrics.values()
        )


def test_ktos_class_means_are_exact_whatever_the_cut():
    policy, batch = random_labels()
    loss = PREFERENCE_LOSSES.bind("kto")
    whole_batch = with_batch_statistics(batch, loss)
    shown = dict.fromkeys(("reward_desirable", "reward_undesirable"), 0.0)
    for index in (
        torch.tensor([0, 2]),
        torch.tensor([3]),
        torch.tensor([1, 4, 5]),
    ):  # the first part holds one class only
        share = PreferenceObjective(loss)(
            PolicySequences(policy.logp[index]), whole_batch.rows(index), ExampleTotals(N)
        )
        for key in shown:
            shown[key] += float(share.metrics[f"loss/{key}"])
    reward = 0.1 * (policy.logp.detach() - batch.completion.ref_logp)
    assert shown["reward_desirable"] == pytest.approx(float(reward[batch.label == 1].mean()))
    assert shown["reward_undesirable"] == pytest.approx(float(reward[batch.label == 0].mean()))


@pytest.mark.parametrize(
    "prompts", [[0, 1], [0, 0, 1, 1], [3, 3, 3, 1, 2, 5], list(range(50)), [0] * 25 + list(range(1, 26))]
)
def test_no_completion_is_paired_with_its_own_prompt(prompts: list[int]):
    prompt = torch.tensor(prompts)
    for seed in range(5):
        partner = mismatched_partner(prompt, seed)
        assert sorted(partner.tolist()) == list(range(len(prompts)))  # every completion once
        assert (prompt[partner] != prompt).all()
        assert torch.equal(partner, mismatched_partner(prompt, seed))


def test_the_pairing_depends_on_the_seed():
    prompt = torch.arange(40)
    assert not torch.equal(mismatched_partner(prompt, 0), mismatched_partner(prompt, 1))


@pytest.mark.parametrize("prompts", [[0], [0, 0, 0, 1]])
def test_a_batch_of_mostly_one_prompt_cannot_be_paired(prompts: list[int]):
    with pytest.raises(ValueError, match="answer one prompt"):
        mismatched_partner(torch.tensor(prompts), 0)


def test_the_class_weight_window_is_the_papers_example():
    # n_D : n_U = 1 : 10 and weight_undesirable 1 put weight_desirable in [10, 15]
    assert class_weight_window(1, 10) == pytest.approx((10.0, 15.0))
    assert class_weight_advice(100, 1000, 12.0, 1.0) is None
    assert class_weight_advice(500, 500, 1.0, 1.0) is None
    advice = class_weight_advice(100, 1000, 1.0, 1.0)
    assert advice is not None and "set weight_desirable between 10 and 15" in advice
    # the other way round: 1000 desirable to 100, weight_desirable stays 1 and weight_undesirable lies in
    # [6.67, 10]
    advice = class_weight_advice(1000, 100, 1.0, 1.0)
    assert advice is not None and "set weight_undesirable between 6.667 and 10" in advice
    assert class_weight_advice(1000, 100, 1.0, 8.0) is None


def test_one_class_alone_is_an_error():
    with pytest.raises(ValueError, match="0 undesirable"):
        class_weight_window(12, 0)


# DCO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 64, 1000])
def test_dcos_gradient_is_its_factor_and_its_value_the_formula(n: int):
    logp = torch.linspace(-12, -0.01, 60, dtype=torch.float64)
    p = logp.exp()
    loss, factor = coverage(logp, n)
    torch.testing.assert_close(loss, -torch.log(1 - (1 - p) ** n), rtol=1e-7, atol=1e-12)
    step = 1e-5
    slope = (coverage(logp + step, n)[0] - coverage(logp - step, n)[0]) / (2 * step)
    torch.testing.assert_close(slope[:-1], -factor[:-1], rtol=1e-5, atol=1e-7)
    policy = PolicySequences(logp.clone().requires_grad_())
    batch = LabelBatch(CompletionFacts(torch.full((60,), 5)), torch.arange(60))
    run("dco", policy, batch, n=n).values.sum().backward()
    torch.testing.assert_close(policy.logp.grad, -factor)


def test_dco_of_one_sample_is_the_likelihood_and_certainty_has_no_gradient():
    logp = doubles(-3.0, -0.5, 0.0)
    assert torch.equal(coverage(logp, 1)[0], -logp) and torch.equal(
        coverage(logp, 1)[1], torch.ones(3).double()
    )
    assert coverage(logp, 8)[1][-1] == 0 and coverage(logp, 8)[0][-1] == 0


def test_dco_of_an_unlikely_answer_is_the_likelihood_less_log_n():
    # 1 - (1 - p)^n = n p to first order, so L = -ln p - ln n, also where p underflows
    loss, factor = coverage(doubles(-40.0, -1000.0, -1e5), 64)
    torch.testing.assert_close(loss, doubles(40, 1000, 1e5) - math.log(64), rtol=1e-14, atol=0)
    torch.testing.assert_close(factor, torch.ones(3).double(), rtol=1e-9, atol=0)


def test_dcos_loss_and_factor_fall_with_n():
    losses, factors = zip(*(coverage(doubles(-0.2, -2.0, -6.0), n) for n in (1, 2, 8, 64)), strict=True)
    assert all(
        (later < earlier).all() for pair in (losses, factors) for earlier, later in itertools.pairwise(pair)
    )


def test_pass_rates_outside_the_unit_interval_are_an_error():
    policy, batch = random_labels()
    with pytest.raises(ValueError, match="outside"):
        run("dco_pass_rate", policy, dataclasses.replace(batch, columns={"pass_rate": torch.full((N,), 1.2)}))


# implicit reward models, reward models ----------------------------------------------------------------------


def test_soft_outcomes_are_mixtures():
    policy, batch = random_labels()
    right, wrong = (
        run("implicit_prm_ce", policy, dataclasses.replace(batch, label=torch.full((N,), value).double()))
        for value in (1.0, 0.0)
    )
    mixed = run(
        "implicit_prm_ce", policy, dataclasses.replace(batch, label=torch.full((N,), 0.3).double())
    ).values
    torch.testing.assert_close(mixed, 0.3 * right.values + 0.7 * wrong.values)


def test_ncas_weights_add_up_to_one_over_each_prompt_also_where_rewards_are_large():
    _, batch = random_labels()
    for scale in (1.0, 1e4):
        weights = STATISTICS.bind("reward_softmax")(
            dataclasses.replace(batch, label=scale * noise(N, 5)), temperature=0.01
        )
        for prompt in (2, 4, 9):
            assert float(weights[batch.prompt == prompt].sum()) == pytest.approx(1.0)


def heads(seed: int = 0) -> tuple[RewardPairs, PairBatch]:
    facts = CompletionFacts(torch.ones(N).long())
    margin = noise(N, 7).abs()
    batch = PairBatch(facts, facts, torch.arange(N), margin=margin, p_chosen=torch.sigmoid(noise(N, 8)))
    return RewardPairs(noise(N, seed).requires_grad_(), noise(N, seed + 1).requires_grad_()), batch


HEAD_PAIRS: list[tuple[str, dict[str, float]]] = [
    *(
        ("bradley_terry", {}),
        ("bradley_terry_margin", {}),
        ("bradley_terry_mmpo", {"gamma": 0.4}),
        ("bradley_terry_soft", {}),
    )
]


@pytest.mark.parametrize(("name", "hp"), HEAD_PAIRS)
def test_a_constant_on_all_rewards_is_seen_by_centring_only(name: str, hp: dict[str, float]):
    rewards, batch = heads()
    shifted = RewardPairs(rewards.chosen + 2, rewards.rejected + 2)
    plain = PREFERENCE_LOSSES.bind(name, hp)
    torch.testing.assert_close(plain(shifted, batch).values, plain(rewards, batch).values)
    centred = PREFERENCE_LOSSES.bind(name, {**hp, "centre": 0.01})
    added = 0.01 * ((rewards.chosen + rewards.rejected + 4) ** 2 - (rewards.chosen + rewards.rejected) ** 2)
    torch.testing.assert_close(centred(shifted, batch).values - centred(rewards, batch).values, added)


@pytest.mark.parametrize(("name", "hp"), HEAD_PAIRS)
def test_equal_rewards_cost_ln_two_without_a_margin_and_gradients_check(name: str, hp: dict[str, float]):
    rewards, batch = heads()
    loss = PREFERENCE_LOSSES.bind(name, hp)
    level = dataclasses.replace(batch, margin=torch.zeros(N).double())
    values = loss(RewardPairs(rewards.chosen, rewards.chosen), level).values
    torch.testing.assert_close(values, torch.full_like(values, LN2))
    assert torch.autograd.gradcheck(
        lambda won, lost: loss(RewardPairs(won, lost), batch).values, (rewards.chosen, rewards.rejected)
    )


def test_soft_reward_targets_of_one_are_bradley_terry_and_margin_zero_too():
    rewards, batch = heads()
    plain = PREFERENCE_LOSSES.bind("bradley_terry")(rewards, batch).values
    certain = dataclasses.replace(
        batch, p_chosen=torch.ones(N).double(), margin=torch.full((N,), 1e6).double()
    )
    torch.testing.assert_close(PREFERENCE_LOSSES.bind("bradley_terry_soft")(rewards, certain).values, plain)
    torch.testing.assert_close(
        PREFERENCE_LOSSES.bind("bradley_terry_mmpo", {"gamma": 1.0})(rewards, certain).values, plain
    )
    level = dataclasses.replace(batch, margin=torch.zeros(N).double())
    torch.testing.assert_close(PREFERENCE_LOSSES.bind("bradley_terry_margin")(rewards, level).values, plain)


def test_a_head_that_was_not_squeezed_is_an_error():
    # (N, 1) logits times (N,) targets would average over all pairs of rows
    rewards, batch = heads()
    with pytest.raises(ValueError, match="squeeze"):
        PREFERENCE_LOSSES.bind("bradley_terry_soft")(
            RewardPairs(rewards.chosen[:, None], rewards.rejected[:, None]), batch
        )
    _, labels = random_labels()
    with pytest.raises(ValueError, match="squeeze"):
        PREFERENCE_LOSSES.bind("orm")(rewards.chosen[:, None], labels)


def test_a_missing_label_is_an_error():
    policy, batch = random_labels()
    unlabelled = dataclasses.replace(batch, label=None)
    for name in ("kto", "implicit_prm_ce", "nca_group", "orm"):
        with pytest.raises(ValueError, match="no labels"):
            run(name, policy_for(name, policy), unlabelled)


# the objective and its statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABELS)
def test_shares_of_any_cut_add_up_to_one_mean(name: str):
    policy, batch = random_labels()
    loss = PREFERENCE_LOSSES.bind(name)
    objective = PreferenceObjective(loss)
    whole_batch = with_batch_statistics(batch, loss)
    together = objective(policy_for(name, policy), whole_batch, ExampleTotals(N))
    torch.testing.assert_close(together.loss, loss(policy_for(name, policy), whole_batch).values.mean())
    parts = [
        objective(
            policy_for(name, PolicySequences(policy.logp[index])), whole_batch.rows(index), ExampleTotals(N)
        )
        for index in torch.tensor([3, 0, 5, 1, 4, 2]).split([1, 3, 2])
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), together.loss)
    for key, value in together.metrics.items():
        torch.testing.assert_close(sum(part.metrics[key] for part in parts), value)


def test_weights_multiply_examples_and_not_the_count():
    policy, batch = random_labels()
    loss = PREFERENCE_LOSSES.bind("implicit_prm_ce")
    weighted = PreferenceObjective(loss)(
        policy, dataclasses.replace(batch, weight=doubles(0, 0, 0, 2, 0, 0)), ExampleTotals(N)
    )
    torch.testing.assert_close(weighted.loss, 2 * loss(policy, batch).values[3] / N)


def test_needs_are_resolved_down_to_tensors():
    kto = PREFERENCE_LOSSES.bind("kto")
    assert statistics_of(kto) == ("z0", "desirable_share")
    assert tensors_of(kto) == {"ref_logp", "label", "mismatched"}
    assert tensors_of(PREFERENCE_LOSSES.bind("napo")) == {"ref_logp", "logp_now"}
    assert tensors_of(PREFERENCE_LOSSES.bind("clo")) == {"ref_logp", "column:is_target_language"}


def test_what_a_loss_needs_is_a_tensor_or_a_statistic_that_exists():
    known = {"ref_logp", "previous_logp", "logp_now", "margin", "p_chosen", "label", "mismatched"}
    for name in PREFERENCE_LOSSES.names():
        spec = PREFERENCE_LOSSES.spec(name)
        assert all(
            need in known or need.startswith("column:") for need in tensors_of(PREFERENCE_LOSSES.bind(name))
        ), name
        assert len(spec.traits & {"pairs", "labels"}) == 1
        for statistic in statistics_of(PREFERENCE_LOSSES.bind(name)):
            assert set(STATISTICS.spec(statistic).inputs) <= spec.hyperparameters.keys()


def test_a_statistic_that_was_not_computed_is_an_error():
    policy, batch = random_labels()
    with pytest.raises(ValueError, match=r"call statistics\.with_batch_statistics on the whole batch"):
        PREFERENCE_LOSSES.bind("kto")(policy, batch)


def test_batches_are_checked_where_they_are_made_and_cut_row_by_row():
    policy, batch = random_labels()
    with pytest.raises(ValueError, match="label has shape"):
        dataclasses.replace(batch, label=torch.ones(2))
    with pytest.raises(ValueError, match="ref_logp has shape"):
        CompletionFacts(torch.ones(3).long(), torch.zeros(2))
    with pytest.raises(ValueError, match="6 chosen completions but 3 rejected"):
        PairBatch(batch.completion, batch.completion.rows(torch.tensor([0, 1, 2])), batch.prompt)
    part = batch.with_statistics(z0=torch.tensor(0.5), size=torch.arange(6)).rows([2, 5])
    assert part.statistics["z0"] == 0.5 and part.statistics["size"].tolist() == [2, 5]
    assert part.mismatched.logp_now.tolist() == batch.mismatched.logp_now[[2, 5]].tolist()
    assert part.columns["pass_rate"].tolist() == [0.5, 0.2] and len(part) == 2
    assert batch.to("meta").mismatched.length.device.type == "meta"
    del policy
