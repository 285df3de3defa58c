"""Thresholds on engine/learner mismatch: when a run warns and when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from rltrain.build.rollout import MISMATCH_BFLOAT16, build_guard
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.config.schema import OnlineRecipe
from rltrain.rollout.engines.transformers import engine as transformers_engine
from rltrain.train import online
from rltrain.train.mismatch import MismatchError, MismatchGuard, choose_rows, find_workers
from support.resumed_runs import SEVENS, lines

GRPO = Path(__file__).parents[2] / "recipes" / "policy" / "grpo.yaml"


def said(guard: MismatchGuard, *values: float) -> list[bool]:
    return [
        guard.check(step, {"rollout/mismatch_abs": value}) is not None for step, value in enumerate(values, 1)
    ]


def test_warnings_start_above_the_first_threshold() -> None:
    assert said(MismatchGuard(0.1, 1.0, 1), 0.0, 0.1, 0.11, 1.0) == [False, False, True, True]


def test_only_steps_in_a_row_stop_the_run() -> None:
    guard = MismatchGuard(0.1, 1.0, 3)
    assert said(guard, 2.0, 2.0, 0.5, 2.0, 2.0) == [True] * 5
    with pytest.raises(
        MismatchError, match=r"step 6: .* is 2\.5 nats, above rollout.mismatch_stop 1 for 3 step"
    ):
        guard.check(6, {"rollout/mismatch_abs": 2.5})


def test_a_mismatch_that_is_not_a_number_is_above_every_threshold() -> None:
    with pytest.raises(MismatchError, match="is nan nats"):
        MismatchGuard(0.1, 1.0, 1).check(1, {"rollout/mismatch_abs": math.nan})


def test_a_warning_names_the_worker_whose_mismatch_the_others_hide() -> None:
    metrics = {"rollout/mismatch_abs": 0.02, "rollout/worker_mismatch/worker-0": 0.01}
    guard = MismatchGuard(0.1, 1.0, 1)
    assert guard.check(1, metrics) is None
    for value in (0.5, math.nan):
        warning = guard.check(1, metrics | {"rollout/worker_mismatch/worker-1": value})
        assert warning is not None and f"0.1: worker-1 {value:.3g}; the others" in warning


def test_a_seeded_share_of_each_workers_rows_is_scored_again() -> None:
    workers = find_workers(["b", "a", "", *["b"] * 499])
    assert workers == {"a": [1], "b": [0, *range(3, 502)]}
    chosen = choose_rows(workers, 1)
    assert chosen == choose_rows(workers, 1) != choose_rows(workers, 2)
    assert chosen["a"] == [1] and len(chosen["b"]) == 5 and set(chosen["b"]) < set(workers["b"])


@pytest.mark.parametrize("updates", [1, 4])
def test_one_wrong_worker_is_told_from_the_others(
    updates: int, random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several updates a step, of which no pass reads all rows, by rows that are scored again."""
    collate = online.collate

    def collate_wrong(groups: Any, lines: Any) -> Any:
        rows, batch = collate(groups, lines)
        wrong = (torch.arange(batch.mask.shape[0]) % 4 == 3)[:, None]
        return rows, batch.replace(rollout_logp=batch.rollout_logp + 0.5 * wrong)

    def name_workers(groups: Any) -> list[str]:
        return [f"worker {row % 4}" for row in range(sum(len(group.completions) for group in groups))]

    monkeypatch.setattr(online, "collate", collate_wrong)
    monkeypatch.setattr(online, "row_workers", name_workers)
    settings = ("rollout.mismatch_warn=8", "rollout.mismatch_stop=9", "loss.policy=reinforce")
    run_of(random_model, tmp_path / "run", *settings, f"learner.updates={updates}")
    for line in lines(tmp_path / "run"):
        apart = [line[f"rollout/worker_mismatch/worker-{number}"] for number in range(4)]
        assert max(apart[:3]) < 1e-5
        assert apart[3] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("engine", "learner", "overrides", "expected"),
    [
        (torch.float32, "no", [], (1e-4, 1e-3, 3)),
        (torch.bfloat16, "no", [], (0.05, 0.2, 3)),
        (torch.float32, "bf16", [], (0.05, 0.2, 3)),
        (torch.float32, "fp16", [], (0.05, 0.2, 3)),
        (
            torch.bfloat16,
            "bf16",
            ["rollout.mismatch_stop=0.5", "rollout.mismatch_patience=1"],
            (0.05, 0.5, 1),
        ),
        (torch.float32, "no", ["rollout.trust_logp=true", "learner.updates=2"], (1e-4, 1e-3, 3)),
    ],
)
def test_thresholds_follow_the_recipe_and_the_lower_precision_of_engine_and_learner(
    engine: torch.dtype, learner: str, overrides: list[str], expected: tuple[float, float, int]
) -> None:
    recipe = load_recipe(GRPO, profile="tiny_cpu", overrides=overrides)
    assert isinstance(recipe, OnlineRecipe)
    guard = build_guard(recipe.rollout, engine, learner)
    assert (guard.warn, guard.stop, guard.patience) == expected


def run_of(model: str, folder: Path, *overrides: str) -> list[float]:
    """The mismatch of each step of a run whose updates move the policy far: 4 of them a step, and
    log-probs of the engine alone.
    """
    settings = (
        "train.steps=2",
        "rollout.prompts=8",
        "rollout.n=4",
        "learner.updates=4",
        "learner.optimizer.lr=0.02",
        "data.eval=null",
    )
    settings = [
        f"model.path={model}",
        f"reward.functions=['{SEVENS}']",
        "loss.terms=[]",
        "reward.workers=1",
        *settings,
        *overrides,
    ]
    assert (
        train_command(check(load_recipe(GRPO, profile="tiny_cpu", overrides=settings)).recipe, folder, [])
        == 0
    )
    return [line["rollout/mismatch_abs"] for line in lines(folder)]


@pytest.mark.parametrize("override", ["rollout.trust_logp=true", "loss.policy=reinforce"])
def test_what_a_steps_own_updates_change_is_no_mismatch(
    override: str, random_model: str, tmp_path: Path
) -> None:
    assert (
        max(run_of(random_model, tmp_path / "run", override)) < 1e-5
    )  # rows of later updates are 2 nats away


def test_an_engine_that_differs_is_stopped_although_its_log_probs_are_trusted(
    random_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = transformers_engine.sample_tokens_

    def raw(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        untouched = torch.log_softmax(logits.float(), dim=-1)  # before the temperature
        tokens, _ = ours(logits, *others)
        return tokens, untouched.gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(transformers_engine, "sample_tokens_", raw)
    with pytest.raises(MismatchError, match="step 1: "):
        run_of(
            random_model,
            tmp_path / "run",
            "rollout.trust_logp=true",
            "rollout.temperature=1.5",
            "rollout.mismatch_patience=1",
        )


@pytest.fixture
def precision_can_change() -> Iterator[None]:
    """accelerate keeps one precision for a process; this one has another for a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("precision_can_change")
def test_a_bfloat16_learner_on_a_cpu_trains_beside_its_bfloat16_engine(
    random_model: str, tmp_path: Path
) -> None:
    settings = (
        "learner.precision=bfloat16",
        "train.steps=5",
        "learner.updates=1",
        "learner.optimizer.lr=0.001",
    )
    apart = run_of(random_model, tmp_path / "run", *settings)
    assert len(apart) == 5 and min(apart) > 1e-3, (
        "a learner in float32 would agree"
    )  # above what stops a run in float32
    assert max(apart) < MISMATCH_BFLOAT16[0]
