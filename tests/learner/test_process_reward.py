"""The process reward model that learns beside the policy (PRIME), compared with transformers, autograd and
AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForCausalLM

from rltrain.config.schema import Learner, Model, Optimizer, ProcessReward
from rltrain.learner.process_reward import ProcessRewardLearner
from rltrain.loss.preference import PREFERENCE_LOSSES
from rltrain.types.policy import TokenRows, TrainBatch

BETA = 0.05


def learner_of(
    path: str, *, layout: dict[str, Any] | None = None, loss: str = "implicit_prm_ce", **settings: Any
) -> ProcessRewardLearner:
    chosen = ProcessReward(optimizer=Optimizer(lr=1e-3, max_grad_norm=1e9), **settings)
    model = Model(path=path)
    core = Learner(optimizer=Optimizer(lr=0.0), **(layout or {}))
    bound = PREFERENCE_LOSSES.bind(loss, {"beta": BETA})
    return ProcessRewardLearner(model, model, chosen, core, bound, total_updates=10, seed=0)


def step(rows: int = 8, group_of: int = 4) -> tuple[TokenRows, TrainBatch]:
    """Random rows of 1 to 6 tokens.

    The last row is not graded, the one before has a reward but no verdict, and the first contains an
    observation of an environment, which does not count.
    """
    g = torch.Generator().manual_seed(3)
    lengths = [5, *torch.randint(1, 7, (rows - 1,), generator=g).tolist()]
    prompts = tuple(tuple(torch.randint(5, 60, (3 + i % 3,), generator=g).tolist()) for i in range(rows))
    completions = tuple(tuple(torch.randint(5, 60, (n,), generator=g).tolist()) for n in lengths)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    mask[0, 2] = False
    mask[-1] = False
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, torch.nan, torch.nan])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.5, torch.nan])
    zeros = torch.zeros(rows, dtype=torch.int64)
    empty = torch.zeros(mask.shape)
    batch = TrainBatch(
        mask, empty, empty + 1, rewards, torch.arange(rows) // group_of, zeros, zeros, correct=correct
    )
    return TokenRows(prompts, completions), batch


def token_logp(model: Any, rows: TokenRows, shape: torch.Size) -> Tensor:
    """(B, T) nats from full logits, row by row, at temperature 1."""
    rows_logp = []
    for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        rows_logp.append(torch.nn.functional.pad(logp, (0, shape[1] - len(completion))))
    return torch.stack(rows_logp)


@pytest.mark.parametrize("update", ["before", "after"])
def test_rewards_loss_and_update_are_those_of_plain_pytorch(
    update: str,
    random_model: str,
    random_tied_model: str,
    assert_stepped_like: Callable[[Any, Any, float], None],
) -> None:
    rows, batch = step()
    learner = learner_of(random_model, reference=random_tied_model, update=update)
    judged = learner.judge(rows, batch)

    model, frozen = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (random_model, random_tied_model)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with torch.no_grad():
        reference = token_logp(frozen, rows, batch.mask.shape)
    ratio = (token_logp(model, rows, batch.mask.shape) - reference) * batch.mask
    graded = ~batch.correct.isnan() & batch.mask.any(1)
    # Six of eight rows have a verdict: 0.05 times the summed log-ratio of counted tokens is the logit of
    # being right.
    loss = binary_cross_entropy_with_logits(BETA * ratio.sum(1)[graded], batch.correct[graded])
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        later = (token_logp(model, rows, batch.mask.shape) - reference) * batch.mask

    assert judged.metrics["process_reward/loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = ratio.detach() if update == "after" else later
    torch.testing.assert_close(judged.reward, expected, atol=2e-4, rtol=0)
    assert (later - ratio).abs().max() > 0.05  # the two differ
    assert judged.reward[0, 2] == 0 and not judged.reward[-1].any()  # masked out
    # Without a verdict: the model does not learn from the row, but judges it.
    assert judged.reward[6].abs().max() > 0.01
    assert_stepped_like(learner, model, 1e-3)


def test_a_model_that_is_its_reference_gives_no_reward_and_a_loss_of_log_two(random_model: str) -> None:
    rows, batch = step()
    judged = learner_of(random_model).judge(rows, batch)
    assert judged.reward.abs().max() < 1e-5
    assert judged.metrics["process_reward/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert judged.metrics["process_reward/lr"] == 1e-3


def test_with_several_updates_a_row_is_judged_by_the_weights_just_before_its_own(random_model: str) -> None:
    rows, batch = step()
    learner = learner_of(random_model, updates=2)
    reward = learner.judge(rows, batch).reward
    # At the start the model is its reference: the first group got exactly 0 and the other did not.
    largest = [reward[batch.group == group].abs().max().item() for group in (0, 1)]
    assert min(largest) < 1e-5 < 1e-2 < max(largest)
    assert learner.version == 2


def test_the_policy_can_be_the_reference(random_model: str) -> None:
    rows, batch = step()
    old = torch.full(batch.mask.shape, -3.0)
    learner = learner_of(random_model, reference="policy")
    assert learner.reference is None
    logp = learner.token_log_probs(rows)
    reward = learner.judge(rows, batch.replace(old_logp=old)).reward
    torch.testing.assert_close(reward, (logp + 3.0) * batch.mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "layout", [{"tokens_per_micro_batch": 10}, {"tokens_per_micro_batch": 25}, {"layout": "packed"}]
)
@pytest.mark.parametrize("loss", ["implicit_prm_ce", "nca_group"])
def test_layouts_change_nothing(
    layout: dict[str, Any], loss: str, random_model: str, random_tied_model: str
) -> None:
    rows, batch = step()
    plain, other = (
        learner_of(random_model, reference=random_tied_model, loss=loss, layout=settings)
        for settings in ({}, layout)
    )
    first = plain.judge(rows, batch)
    second = other.judge(rows, batch)
    torch.testing.assert_close(second.reward, first.reward, atol=5e-5, rtol=0)
    for name, value in first.metrics.items():
        assert second.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_contrast_counts_right_wrong_pairs_of_a_prompt(random_model: str, random_tied_model: str) -> None:
    rows, batch = step()
    judged = learner_of(random_model, reference=random_tied_model).judge(rows, batch)
    total = judged.reward.sum(1).tolist()
    # prompt 0: rows 0 and 3 right, 1 and 2 wrong; prompt 1: row 5 right, 4 wrong
    first = sum(total[right] > total[wrong] for right in (0, 3) for wrong in (1, 2)) / 4
    assert judged.metrics["process_reward/contrast"] == pytest.approx((first + (total[5] > total[4])) / 2)


def test_rewards_without_a_verdict_are_refused_and_a_step_that_nobody_graded_is_not(
    random_model: str,
) -> None:
    rows, batch = step()
    learner = learner_of(random_model)
    with pytest.raises(ValueError, match="no reward function says so"):
        learner.judge(rows, batch.replace(correct=torch.full_like(batch.correct, torch.nan)))
    before = {name: value.clone() for name, value in learner.weights()}
    ungraded = dataclasses.replace(
        batch, mask=torch.zeros_like(batch.mask), rewards=torch.full_like(batch.rewards, torch.nan)
    )
    judged = learner.judge(rows, ungraded)
    assert not judged.reward.any()
    assert learner.version == 0
    assert all(torch.equal(before[name], value) for name, value in learner.weights())
