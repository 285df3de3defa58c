"""The learner compared with plain PyTorch; effects of layouts, idle rows and non-finite numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltrain.config.schema import Learner, Model, Optimizer
from rltrain.control.stage import PerUpdateControls
from rltrain.learner.optim import build_optimizer, build_schedule
from rltrain.learner.policy_learner import PolicyLearner
from rltrain.learner.trained_model import NonFiniteError
from rltrain.loss import AGGREGATES, LOSS_TERMS
from rltrain.loss.objective import Objective, Term
from rltrain.loss.policy import POLICY_LOSSES
from rltrain.registry import BoundMethod, MethodSpec
from rltrain.types.policy import TokenRows, TrainBatch

TEMPERATURE = 0.7


def learner_of(path: str, *, lr: float = 1e-2, weight_decay: float = 0.0, **settings: Any) -> PolicyLearner:
    optimizer = Optimizer(lr=lr, weight_decay=weight_decay, max_grad_norm=1e9)
    return PolicyLearner(
        Model(path=path),
        Learner(optimizer=optimizer, **settings),
        temperature=TEMPERATURE,
        max_tokens=8,
        total_updates=10,
        seed=0,
    )


def objective_of(loss: str = "clip", kl: float = 0.0, aggregate: str = "token_mean") -> Objective:
    terms = (Term("kl", LOSS_TERMS.bind("kl"), kl),) if kl else ()
    return Objective(POLICY_LOSSES.bind(loss), terms, AGGREGATES.bind(aggregate))


def step(seed: int = 0, rows: int = 12, group_of: int = 4) -> tuple[TokenRows, TrainBatch]:
    """Random rows of 1 to 6 completion tokens, three groups of four; the middle group has advantage 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows,), generator=g).tolist()
    prompts = tuple(tuple(torch.randint(5, 60, (int(3 + i % 3),), generator=g).tolist()) for i in range(rows))
    completions = tuple(tuple(torch.randint(5, 60, (n,), generator=g).tolist()) for n in lengths)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    group = torch.arange(rows) // group_of
    advantages = torch.randn(rows, generator=g) * (group != 1)
    batch = TrainBatch(
        mask=mask,
        advantages=advantages[:, None].expand(mask.shape).contiguous(),
        weights=torch.ones(mask.shape),
        rewards=advantages,
        group=group,
        source=torch.zeros(rows, dtype=torch.int64),
        version=torch.zeros(rows, dtype=torch.int64),
        rollout_logp=torch.zeros(mask.shape),
    )
    return TokenRows(prompts, completions), batch


def weights_of(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.weights()}


def test_the_tokens_that_were_clipped_are_those_that_the_metrics_count(random_model: str) -> None:
    rows, batch = step()
    learner = learner_of(random_model, epochs=3, tokens_per_micro_batch=64)
    logp = learner.annotate(rows, frozenset({"logp"}), {})["logp"]
    update = learner.update(rows, batch.replace(old_logp=logp), objective_of())
    share = update.metrics["loss/clip_low"] + update.metrics["loss/clip_high"]  # mean over the updates
    assert update.clipped.sum() == pytest.approx(3 * share * float(batch.mask.sum()), rel=1e-5) and share > 0
    assert update.touched is None  # there is no control
    assert not update.clipped[~batch.mask].any() and update.clipped.max() <= 2  # the first one clips nothing


def test_one_update_is_what_plain_pytorch_computes(
    random_model: str, assert_stepped_like: Callable[[Any, Any, float], None]
) -> None:
    rows, batch = step()
    learner = learner_of(random_model)
    stats = learner.update(rows, batch, objective_of("reinforce"))

    # Oracle: row by row, -A log pi over the step's tokens, AdamW with its defaults.
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.zeros(())
    for i, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
        loss = loss - batch.advantages[i, 0] * logp / batch.mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()

    assert stats.metrics["loss/total"] == pytest.approx(loss.item(), abs=1e-6)
    assert stats.metrics["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert_stepped_like(learner, model, 1e-2)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings", [{"tokens_per_micro_batch": 10}, {"tokens_per_micro_batch": 30}, {"layout": "packed"}]
)
def test_layouts_do_not_change_the_update(random_model: str, settings: dict[str, Any], kl: float) -> None:
    rows, batch = step()
    plain = learner_of(random_model)
    split = learner_of(random_model, **settings)
    batch = batch.replace(
        ref_logp=torch.full(batch.mask.shape, -3.0), old_logp=torch.full(batch.mask.shape, -4.0)
    )
    first = plain.update(rows, batch, objective_of(kl=kl))
    second = split.update(rows, batch, objective_of(kl=kl))
    for name, value in first.metrics.items():
        assert second.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(second.logp, first.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(second.entropy, first.entropy, atol=1e-5, rtol=0)


def test_idle_rows_skip_the_gradient_pass_and_change_nothing(random_model: str) -> None:
    rows, batch = step()
    fewer = learner_of(random_model).update(rows, batch, objective_of())
    all_rows = learner_of(random_model, skip_idle_rows=False).update(rows, batch, objective_of())
    # The middle group of four has advantage 0.
    assert (fewer.idle_rows, fewer.trained_rows, all_rows.trained_rows) == (4, 8, 12)
    assert fewer.trained_tokens < all_rows.trained_tokens
    assert fewer.metrics["learner/grad_norm"] == pytest.approx(
        all_rows.metrics["learner/grad_norm"], rel=1e-5
    )
    torch.testing.assert_close(fewer.logp, all_rows.logp, atol=1e-6, rtol=0)
    torch.testing.assert_close(fewer.entropy, all_rows.entropy, atol=1e-6, rtol=0)


def test_a_kl_term_leaves_no_row_idle(random_model: str) -> None:
    rows, batch = step()
    batch = batch.replace(ref_logp=torch.full(batch.mask.shape, -3.0))
    assert learner_of(random_model).update(rows, batch, objective_of(kl=0.1)).idle_rows == 0


def test_a_step_without_any_signal_still_applies_momentum_and_weight_decay(random_model: str) -> None:
    # Gradient 0 is not "no gradient": AdamW's decoupled decay multiplies every matrix by
    # 1 - lr * decay = 1 - 0.01 * 0.5.
    rows, batch = step()
    learner = learner_of(random_model, weight_decay=0.5)
    before = weights_of(learner)
    stats = learner.update(rows, batch.replace(advantages=torch.zeros(batch.mask.shape)), objective_of())
    assert stats.metrics["learner/grad_norm"] == 0
    assert stats.trained_rows == 0
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(weights_of(learner)[name], before[name] * (1 - 0.01 * 0.5))


def test_updates_and_epochs_count_versions_and_see_whole_groups(random_model: str) -> None:
    rows, batch = step()
    learner = learner_of(random_model, updates=3, epochs=2, lr=1e-3)
    old = learner.annotate(rows, frozenset({"logp", "entropy"}))
    groups: list[list[int]] = []

    def watch(part: TrainBatch) -> TrainBatch:
        groups.append(sorted(set(part.group.tolist())))
        assert part.logp_now is not None
        assert len(part.group) == 4  # a group is never split
        return part

    spec = MethodSpec(
        name="watch",
        check="",
        arxiv=None,
        needs=frozenset({"logp_now"}),
        needs_if={},
        traits=frozenset(),
        refuses={},
        module=__name__,
        attribute="watch",
        hyperparameters={},
        positional=(),
        inputs=(),
        doc="changes nothing",
    )
    learner.update(
        rows,
        batch.replace(old_logp=old["logp"]),
        objective_of(),
        PerUpdateControls((BoundMethod(spec, {}, watch),)),
    )
    assert learner.version == 6
    assert sorted(groups[:3]) == sorted(groups[3:]) == [[0], [1], [2]]


def test_a_step_with_fewer_groups_than_updates_makes_one_update_per_group(random_model: str) -> None:
    rows, batch = step()
    learner = learner_of(random_model, updates=16)
    learner.update(rows, batch.replace(old_logp=torch.full(batch.mask.shape, -4.0)), objective_of())
    assert learner.version == 3


def test_a_non_finite_update_is_skipped_counted_and_stops_the_run_in_the_end(random_model: str) -> None:
    rows, batch = step()
    broken = batch.replace(advantages=torch.full(batch.mask.shape, math.inf))
    learner = learner_of(random_model, max_nonfinite=2)
    before = weights_of(learner)
    assert learner.update(rows, broken, objective_of()).skipped_updates == 1
    assert learner.version == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.weights())
    # A good update restarts the count.
    assert learner.update(rows, batch, objective_of()).skipped_updates == 0
    learner.update(rows, broken, objective_of())
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*version 1.*learner.optimizer.lr"):
        learner.update(rows, broken, objective_of())


def test_annotation_is_the_log_prob_at_the_sampling_temperature(random_model: str) -> None:
    rows, _ = step()
    notes = learner_of(random_model).annotate(rows, frozenset({"logp", "entropy"}))
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    for i, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        full = (logits / TEMPERATURE).log_softmax(-1)
        picked = full.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(notes["logp"][i, : len(completion)], picked, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            notes["entropy"][i, : len(completion)], -(full.exp() * full).sum(-1), atol=1e-5, rtol=0
        )
        assert not notes["logp"][i, len(completion) :].any()


def test_warmup_and_schedules_reach_their_rates(random_model: str) -> None:
    rows, batch = step()
    learner = PolicyLearner(
        Model(path=random_model),
        Learner(optimizer=Optimizer(lr=1.0, warmup_steps=2, schedule="linear")),
        temperature=1.0,
        max_tokens=8,
        total_updates=6,
        seed=0,
    )
    rates = []
    for _ in range(6):
        rates.append(learner.lr)
        learner.update(rows, batch.replace(advantages=torch.zeros(batch.mask.shape)), objective_of())
    # Two updates up to 1, then down by a quarter in each of the remaining four.
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        # 0.2 + 0.8 (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4, 1
        ("cosine", [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2]),
    ],
)
def test_a_schedule_ends_at_its_floor(schedule: Literal["linear", "cosine"], rates: list[float]) -> None:
    settings = Optimizer(lr=3.0, warmup_steps=2, schedule=schedule, min_lr_ratio=0.2)
    optimizer = build_optimizer([("w", torch.nn.Parameter(torch.zeros(2, 2)))], settings)
    scheduler = build_schedule(optimizer, settings, total_updates=6)
    measured_rates = []
    for _ in rates:
        measured_rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert measured_rates == pytest.approx([3 * rate for rate in rates], abs=1e-5)


def test_the_order_of_a_set_does_not_decide_which_numbers_ranks_add(
    random_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each rank's strings hash differently, so its sets do: rank 0 would add its log-probs to rank 1's
    # entropies.
    class Backwards(frozenset[str]):
        def __iter__(self) -> Any:
            return iter(sorted(frozenset(self), reverse=True))

    rows, _ = step()
    learner = learner_of(random_model)
    added: list[torch.Tensor] = []
    monkeypatch.setattr(learner.trained, "sum_over_ranks", lambda value: added.append(value) or value)
    for wants in (frozenset, Backwards):
        learner.annotate(rows, wants({"logp", "entropy"}))
    # entropy, then log-prob, both times
    assert [bool(value.max() > 0) for value in added] == [True, False, True, False]


def test_a_loss_that_is_not_finite_stops_the_step_even_where_its_gradient_is(random_model: str) -> None:
    rows, batch = step()
    learner = learner_of(random_model)
    objective = objective_of("reinforce")

    class Off:
        needs = objective.needs
        idle_rows = objective.idle_rows

        def __call__(self, *arguments: Any) -> Any:
            share = objective(*arguments)
            return dataclasses.replace(share, loss=share.loss + math.inf)

    before = weights_of(learner)
    stats = learner.update(rows, batch, Off())  # type: ignore[arg-type]
    assert (stats.skipped_updates, learner.version) == (1, 0)
    assert all(torch.equal(value, before[name]) for name, value in learner.weights())
