"""Entropy controls inside the learner: three updates of a real model, whatever the micro-batches, and
twice the same to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.control import TOKEN_CONTROLS
from rltrain.control.stage import apply_control, split_by_timing
from rltrain.learner.policy_learner import PolicyLearner, UpdateStats
from rltrain.loss import AGGREGATES
from rltrain.loss.objective import Objective
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.types.policy import TokenRows, TrainBatch
from rltrain.types.samples import SOURCE_POLICY, SOURCE_TEMPERED

ROWS = 18
LONGEST = 6
WIDE = {"low": -100.0, "high": 100.0, "ratio": 0.1, "eps_low": 0.2, "eps_high": 0.2}
CASES: dict[str, tuple[list[tuple[str, dict[str, Any]]], str]] = {
    "clip_cov, steer, 80/20": (
        [("clip_cov", WIDE), ("steer", {"form": "linear"}), ("high_entropy_tokens", {"share": 0.7})],
        "clip",
    ),
    "kl_cov": ([("kl_cov", {"ratio": 0.1})], "kl_cov"),
    "aepo": ([("aepo", {"alpha": 0.5})], "clip"),
    "dcpo, exact steer, ce_gppo": ([("dcpo", {}), ("steer", {"omega": "exact"})], "ce_gppo"),
}


def step() -> tuple[TokenRows, TrainBatch]:
    """Six groups of three random rows of 1 to 6 tokens, the last of each sampled at another temperature."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=generator)
    prompts = tuple(
        tuple(torch.randint(5, 60, (3 + i % 3,), generator=generator).tolist()) for i in range(ROWS)
    )
    completions = tuple(tuple(torch.randint(5, 60, (int(n),), generator=generator).tolist()) for n in lengths)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    advantages = torch.randn(ROWS, 1, generator=generator).expand(mask.shape).contiguous()
    row = torch.arange(ROWS)
    batch = TrainBatch(
        mask=mask,
        advantages=advantages,
        weights=torch.ones(mask.shape),
        rewards=advantages[:, 0],
        group=row // 3,
        source=torch.where(row % 3 == 2, SOURCE_TEMPERED, SOURCE_POLICY),
        version=row * 0,
        sample=row % 3,
        correct=(advantages[:, 0] > 0).float(),
    )
    return TokenRows(prompts, completions), batch


def train(model: str, case: str, tokens_per_micro_batch: int) -> tuple[UpdateStats, Tensor]:
    """Statistics of three updates, and the log-probs of the step afterwards."""
    references, loss = CASES[case]
    settings = Learner(
        optimizer=Optimizer(lr=1e-3, max_grad_norm=1e9),
        updates=3,
        tokens_per_micro_batch=tokens_per_micro_batch,
    )
    learner = PolicyLearner(
        Model(path=model), settings, temperature=1.0, max_tokens=8, total_updates=10, seed=0
    )
    rows, batch = step()
    controls = [TOKEN_CONTROLS.bind(name, hp) for name, hp in references]
    early, later = split_by_timing(controls)
    needs = {name for control in early for name in control.needs if ":" in name}
    statistics = learner.annotate(rows, frozenset({"logp", "entropy", *needs}))
    batch = batch.replace(old_logp=statistics["logp"], old_entropy=statistics["entropy"])
    batch = batch.with_extra(**{name: value for name, value in statistics.items() if ":" in name})
    for control in early:
        batch = apply_control(batch, control)
    objective = Objective(POLICY_LOSSES.bind(loss), (), AGGREGATES.bind("token_mean"))
    stats = learner.update(rows, batch, objective, later)
    return stats, learner.annotate(rows, frozenset({"logp"}))["logp"]


def test_a_run_repeats_to_the_bit(random_model: str):
    first, second = (train(random_model, "clip_cov, steer, 80/20", 24) for _ in range(2))
    assert first[0].metrics == second[0].metrics and torch.equal(first[1], second[1])


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_neither_the_choice_nor_the_update(random_model: str, case: str):
    whole_stats, whole_logp = train(random_model, case, 4096)
    parts_stats, parts_logp = train(random_model, case, 24)
    assert parts_stats.metrics.keys() == whole_stats.metrics.keys()
    for name, value in whole_stats.metrics.items():
        assert parts_stats.metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert_close(parts_logp, whole_logp, atol=2e-4, rtol=0)


def test_kl_cov_does_nothing_in_a_step_s_first_update_and_pulls_in_the_others(random_model: str):
    # the penalty is |ln r|: 0 while the policy is the old one
    _, plain = with_beta(random_model, 0.0, updates=1)
    _, pulled = with_beta(random_model, 1.0, updates=1)
    assert torch.equal(plain, pulled)
    plain_stats, plain = with_beta(random_model, 0.0, updates=3)
    stats, pulled = with_beta(random_model, 1.0, updates=3)
    assert stats.metrics["loss/kl_cov_penalty"] > 0 and not torch.equal(plain, pulled)
    assert plain_stats.metrics["control/kl_cov_touched"] == stats.metrics["control/kl_cov_touched"] > 0


def test_the_tokens_that_a_control_touched_are_those_that_its_metric_counts(random_model: str):
    _, batch = step()
    stats, _ = with_beta(random_model, 1.0, updates=1)
    assert stats.touched is not None
    share = stats.metrics["control/kl_cov_touched"]
    assert stats.touched.sum() == pytest.approx(share * int(batch.mask.sum())) and share > 0
    # a control over the whole step touches a token in all updates that train on it
    both, _ = train(random_model, "clip_cov, steer, 80/20", 24)
    assert both.touched is not None and both.touched.shape == batch.mask.shape
    assert both.touched.sum() > 0 and both.touched.max() == 1 and not both.touched[~batch.mask].any()


def with_beta(model: str, beta: float, updates: int) -> tuple[UpdateStats, Tensor]:
    settings = Learner(
        optimizer=Optimizer(lr=1e-3, max_grad_norm=1e9), updates=updates, tokens_per_micro_batch=24
    )
    learner = PolicyLearner(
        Model(path=model), settings, temperature=1.0, max_tokens=8, total_updates=10, seed=0
    )
    rows, batch = step()
    statistics = learner.annotate(rows, frozenset({"logp", "entropy"}))
    _, later = split_by_timing([TOKEN_CONTROLS.bind("kl_cov", {"ratio": 0.3})])
    objective = Objective(POLICY_LOSSES.bind("kl_cov", {"beta": beta}), (), AGGREGATES.bind("token_mean"))
    batch = batch.replace(old_logp=statistics["logp"], old_entropy=statistics["entropy"])
    return learner.update(rows, batch, objective, later), learner.annotate(rows, frozenset({"logp"}))["logp"]
