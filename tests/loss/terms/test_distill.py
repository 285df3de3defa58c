"""KDRL and RAPO on a tabular softmax, where every expectation is a sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.control import TOKEN_CONTROLS
from rltrain.control.stage import split_by_timing
from rltrain.loss import LOSS_TERMS
from rltrain.loss.terms.distill import reference_powers
from rltrain.types.policy import PolicyTokens, TrainBatch

VOCAB = 7


def draws(*seeds: int) -> list[Tensor]:
    return [
        torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]


def batch_of(width: int, reward: float = 1.0, **fields: Tensor) -> TrainBatch:
    zeros = torch.zeros(1, width, dtype=torch.float64)
    row = torch.zeros(1, dtype=torch.int64)
    return TrainBatch(
        mask=zeros + 1,
        advantages=zeros,
        weights=zeros + 1,
        rewards=torch.tensor([reward]).double(),
        group=row,
        source=row,
        version=row,
        **fields,
    )  # type: ignore[arg-type]


def every_token(name: str, logp: Tensor, batch: TrainBatch, **hp: object) -> Tensor:
    """(V,) the term with each token of the vocabulary as the sampled one: column v of the batch is
    token v.
    """
    return LOSS_TERMS.bind(name, hp)(PolicyTokens(logp[None]), batch).values[0]


def expected_slope(name: str, logits: Tensor, sampler: Tensor, batch: TrainBatch, **hp: object) -> Tensor:
    """Gradient with respect to the logits, expected over tokens of probability ``sampler``."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((sampler * every_token(name, leaf.log_softmax(0), batch, **hp)).sum(), leaf)[0]


def test_kdrl_on_policy_has_the_gradient_of_the_reverse_kl_to_the_teacher() -> None:
    logits, teacher = draws(0, 1)
    batch = batch_of(VOCAB, teacher_logp=teacher.log_softmax(0)[None])
    leaf = logits.clone().requires_grad_()
    reverse = (leaf.softmax(0) * (leaf.log_softmax(0) - teacher.log_softmax(0))).sum()
    exact = torch.autograd.grad(reverse, leaf)[0]
    assert_close(expected_slope("kdrl", logits, logits.softmax(0), batch), exact)
    assert (
        expected_slope("kdrl", logits, logits.softmax(0), batch, estimator="k3") - exact
    ).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_teacher_that_is_the_student_pulls_nowhere(estimator: str) -> None:
    (logits,) = draws(0)
    batch = batch_of(VOCAB, teacher_logp=logits.log_softmax(0)[None])
    assert not every_token("kdrl", logits.log_softmax(0), batch, estimator=estimator).any()
    assert expected_slope("kdrl", logits, logits.softmax(0), batch, estimator=estimator).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("reward", "phi"), [(1.0, 1.0), (0.7, 0.7), (0.0, 0.5), (-1.0, 0.5), (3.0, 1.0), (math.nan, 1.0)]
)
def test_rapo_has_the_gradient_of_the_forward_kl_from_the_flattened_reference(
    reward: float, phi: float
) -> None:
    # samples of an older policy b: E_b[-q / b grad ln pi] = pi - q, for any b
    logits, reference, older = draws(0, 1, 2)
    q = (phi * reference.log_softmax(0)).softmax(0)
    batch = rapo_batch(reference, older, reward)
    assert_close(expected_slope("rapo", logits, older.softmax(0), batch, cap=1e9), logits.softmax(0) - q)


def rapo_batch(reference: Tensor, older: Tensor, reward: float) -> TrainBatch:
    """As the learner fills it: ln of the powers' sum at each token, for the power of the row's reward."""
    empty = batch_of(VOCAB, reward)
    (power,) = reference_powers(frozenset({"ref_log_mass:0.5", "logp"}), empty).values()
    mass = (power * reference.log_softmax(0)).logsumexp(0).expand(1, VOCAB)
    return batch_of(
        VOCAB, reward, ref_logp=reference.log_softmax(0)[None], old_logp=older.log_softmax(0)[None]
    ).with_extra(**{"ref_log_mass:0.5": mass})


def test_rapos_metric_is_the_forward_kl_on_average() -> None:
    logits, reference = draws(0, 1)
    q = reference.softmax(0)
    p = logits.softmax(0)
    batch = rapo_batch(reference, logits, 1.0)
    kl = LOSS_TERMS.bind("rapo")(PolicyTokens(logits.log_softmax(0)[None]), batch).metrics["kl"][0]
    assert (kl >= 0).all()
    assert_close((p * kl).sum(), (q * (q / p).log()).sum())


def test_rapo_at_an_unflattened_reference_pulls_nowhere() -> None:
    (logits,) = draws(0)
    batch = rapo_batch(logits, logits, 1.0)
    assert expected_slope("rapo", logits, logits.softmax(0), batch).abs().max() < 1e-15
    assert not LOSS_TERMS.bind("rapo")(PolicyTokens(logits.log_softmax(0)[None]), batch).metrics["kl"].any()


def test_rapos_worked_gradient() -> None:
    # p = [.5, .3, .2], q = [.2, .3, .5]: p - q, and not the gradient of the estimator of the value, [.320702,
    # .082466, -.403168]
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    q = torch.tensor([0.2, 0.3, 0.5]).double()
    batch = batch_of(3, ref_logp=q.log()[None], old_logp=p.log()[None]).with_extra(
        **{"ref_log_mass:0.5": torch.zeros(1, 3).double()}
    )
    assert_close(expected_slope("rapo", p.log(), p, batch), p - q)


# which completions the teacher is heard on ------------------------------------------------------------------


def groups(correct: list[float], group: list[int]) -> TrainBatch:
    """One token per completion, except the first, which has three."""
    mask = torch.zeros(len(group), 3)
    mask[:, 0], mask[0] = 1.0, 1.0
    zeros = torch.zeros(len(group), 3)
    ids = torch.tensor(group)
    return TrainBatch(
        mask=mask,
        advantages=zeros,
        weights=zeros + 1,
        rewards=zeros[:, 0],
        group=ids,
        source=ids * 0,
        version=ids * 0,
        correct=torch.tensor(correct),
    )


def test_the_mask_goes_by_completion_or_by_group_and_makes_up_for_what_it_leaves_out() -> None:
    # 5 + 1 = 6 tokens. Wrong: rows 0 (3 tokens), 2, 3: 5 tokens, 6 / 5 each. Groups without a right one: 9,
    # rows 2 and 3: 6 / 2.
    batch = groups([0.0, 1.0, 0.0, 0.0], [5, 5, 9, 9])
    mark = TOKEN_CONTROLS.bind("kdrl_mask")(batch).extra["kdrl"]
    assert_close(mark, torch.tensor([[1.2, 1.2, 1.2], [0, 0, 0], [1.2, 0, 0], [1.2, 0, 0]]))
    mark = TOKEN_CONTROLS.bind("kdrl_mask", {"level": "group"})(batch).extra["kdrl"]
    assert_close(mark, torch.tensor([[0, 0, 0], [0, 0, 0], [3.0, 0, 0], [3.0, 0, 0]]))
    assert float(mark.sum()) == float(batch.mask.sum())


def test_all_right_marks_nothing() -> None:
    assert not TOKEN_CONTROLS.bind("kdrl_mask")(groups([1.0, 1.0], [0, 0])).extra["kdrl"].any()


def test_the_mask_is_taken_over_each_optimizer_batch() -> None:
    control = TOKEN_CONTROLS.bind("kdrl_mask")
    once, adjust = split_by_timing([control, TOKEN_CONTROLS.bind("tis")])
    assert [step_control.name for step_control in once] == ["tis"]
    assert adjust is not None and adjust.controls == (control,) and adjust.needs == frozenset()


def test_without_a_verdict_the_mask_says_so() -> None:
    with pytest.raises(ValueError, match="which completions are correct, and no reward function reports it"):
        TOKEN_CONTROLS.bind("kdrl_mask")(groups([math.nan, math.nan], [0, 0]))


@pytest.mark.parametrize(
    ("name", "said"),
    [("kdrl", "needs teacher_logp"), ("rapo", "needs ref_logp, old_logp and 'ref_log_mass:0.5'")],
)
def test_a_missing_input_is_named(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LOSS_TERMS.bind(name)(PolicyTokens(torch.zeros(1, 1)), batch_of(1))
