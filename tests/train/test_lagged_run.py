"""Step t trains on samples of the weights after step t - 1 - lag, also in a run that is killed anywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rltrain.checkpoint import journal as journal_module
from rltrain.checkpoint.journal import Journal
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.cli.replay import plan_command, replay_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError, UserError
from rltrain.rollout import collate as collate_module
from rltrain.train import online
from support.resumed_runs import ROOT, assert_same_run, differing, killed_in, lines, train_here

LAG = ("rollout.schedule={lag: 2}", "control=[tis]", "rollout.adaptive_temperature={tau: 0.5}")
UPDATES = 2  # of a step, by the settings of ``train_here``


@pytest.fixture(scope="module")
def start(random_model: str) -> Callable[..., int]:
    return functools.partial(train_here, random_model)


@pytest.fixture(scope="module")
def uninterrupted(start: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a lag of two; the temperature adapts to the steps, two steps later."""
    folder = tmp_path_factory.mktemp("lag") / "whole"
    assert start(folder, *LAG) == 0
    return folder


def test_a_lag_of_none_is_the_synchronous_run(start: Any, tmp_path: Path) -> None:
    assert start(tmp_path / "sync") == 0
    assert start(tmp_path / "lag", "rollout.schedule={lag: 0}") == 0
    assert not differing(tmp_path / "sync", tmp_path / "lag", "model/model.safetensors")
    assert lines(tmp_path / "sync") == lines(tmp_path / "lag")


def test_each_step_trains_on_samples_of_one_older_version(uninterrupted: Path) -> None:
    journal = Journal(RunFolder(uninterrupted))
    records = [journal.read(step) for step in range(1, 7)]
    assert [record.header.version for record in records] == [0, 0, 0, UPDATES, 2 * UPDATES, 3 * UPDATES]
    for record in records:
        _, batch = collate_module.collate(record.groups)
        assert batch.version.shape == batch.mask.shape
        assert batch.version.unique().tolist() == [record.header.version] == batch.oldest.unique().tolist()
    rows = [line for line in lines(uninterrupted) if "staleness/mean" in line]
    ages = [0, UPDATES, 2 * UPDATES, 2 * UPDATES, 2 * UPDATES, 2 * UPDATES]
    assert [line["staleness/mean"] for line in rows] == ages
    assert [line["staleness/max"] for line in rows] == [line["staleness/oldest"] for line in rows] == ages
    assert rows[0]["staleness/ratio_mass@0"] == pytest.approx(1, abs=1e-3)
    assert f"staleness/ratio_mass@{2 * UPDATES}" in rows[5]
    # sampled with the first weights, the steps up to 3 had no signal yet; step 4 has that of step 1
    assert ["control/temperature_sigma" in line for line in rows] == [False] * 3 + [True] * 3


EVENTS = {
    "before the rollouts of a step are written": (6, journal_module, "write_atomic"),
    "while step 4 has its rows": (4, online, "collate"),
    "before the update of step 5": (5, online, "apply_methods"),
    "after the push of step 5": (5, online, "report_step"),
    "before step 2, without a checkpoint": (2, online, "collate"),
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_run_that_is_killed_goes_on_to_the_bit(
    event: str, start: Any, uninterrupted: Path, tmp_path: Path
) -> None:
    killed_in(*EVENTS[event], lambda: start(tmp_path / "run", *LAG))
    assert start(tmp_path / "run", *LAG) == 0
    assert_same_run(uninterrupted, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-3/training/state.json").read_text())
    assert [step for step, _ in state["ahead"]] == [4, 5]


def test_it_replays_to_the_bit(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_command(plan_command(uninterrupted, None, [], check=True), None, check=True) == 0
    assert "equal to the bit" in capsys.readouterr().out


def test_the_tokens_that_each_was_drawn_from_wait_with_it(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truncated sampling: the learner's log-probs are over the same tokens, steps later and after a kill."""
    keys = ("rollout.schedule={lag: 2}", "control=[tis]", "rollout.top_k=5", "learner.updates=1")
    run = tmp_path / "run"
    killed_in(5, online, "apply_methods", lambda: start(run, *keys))
    assert start(run, *keys) == 0
    journal = Journal(RunFolder(run))
    for step in range(1, 7):
        for group in journal.read(step).groups:
            for completion in group.completions:
                assert completion.kept is not None
                assert list(completion.kept.sizes) == [5] * len(completion.token_ids)
    rows = [line for line in lines(run) if "staleness/mean" in line]
    # were they over the whole vocabulary, the ratio to the first weights would be far below 1
    assert rows[0]["staleness/ratio_mass@0"] == pytest.approx(1, abs=1e-3)
    assert all(0.8 < line[f"staleness/ratio_mass@{min(place, 2)}"] < 1.25 for place, line in enumerate(rows))
    assert replay_command(plan_command(run, None, [], check=True), None, check=True) == 0
    assert "equal to the bit" in capsys.readouterr().out


def test_what_was_sampled_ahead_must_be_there(start: Any, tmp_path: Path) -> None:
    killed_in(5, online, "apply_methods", lambda: start(tmp_path / "run", *LAG))
    journal = Journal(RunFolder(tmp_path / "run"))
    journal.path(5).write_bytes(journal.path(4).read_bytes())
    with pytest.raises(UserError, match=r"step-000005\.parquet is not what was sampled for step 5"):
        start(tmp_path / "run", *LAG)


def test_a_run_with_a_lag_is_not_made_longer(start: Any, uninterrupted: Path) -> None:
    constant = ("learner.optimizer.schedule=constant",)
    with pytest.raises(UserError, match=r"train\.steps: 6 -> 9"):
        start(uninterrupted, *LAG, *constant, "train.steps=9")


@pytest.mark.parametrize(
    ("recipe", "keys", "problem"),
    [
        ("policy/grpo", ["journal.keep=nothing"], "journal.keep is nothing; set it to all or resume"),
        ("preference/inpo_online", [], "pairs are compared with the policy at the start of their step"),
        ("policy/grpo", ["rollout.schedule={lag: -1}"], "greater than or equal to 0"),
    ],
)
def test_what_does_not_go_with_a_lag_is_refused(recipe: str, keys: list[str], problem: str) -> None:
    path = ROOT / f"recipes/{recipe}.yaml"
    with pytest.raises(RecipeError) as error:
        check(load_recipe(path, profile="tiny_cpu", overrides=["rollout.schedule={lag: 1}", *keys]))
    assert problem in " ".join(error.value.problems)


@pytest.mark.parametrize("settings", ["{lag: 1}", "{bounded: {versions: 1}}"])
def test_a_mixture_of_experts_is_refused(settings: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8}))
    keys = [f"model.path={tmp_path}", f"rollout.schedule={settings}"]
    with pytest.raises(RecipeError) as error:
        check(load_recipe(ROOT / "recipes/policy/grpo.yaml", profile="tiny_cpu", overrides=keys))
    (problem,) = [text for text in error.value.problems if "has 8 experts" in text]
    assert "kept beside its log-prob" in problem and problem.endswith("set rollout.schedule to sync")


@pytest.mark.parametrize(
    ("keys", "warns"), [([], True), (["control=[tis]"], False), (["rollout.trust_logp=true"], False)]
)
def test_a_lag_that_nothing_corrects_is_warned_of(keys: list[str], warns: bool) -> None:
    recipe = load_recipe(
        ROOT / "recipes/policy/grpo.yaml",
        profile="tiny_cpu",
        overrides=["rollout.schedule={lag: 1}", *keys],
    )
    warnings = [text for text in check(recipe).warnings if "add one of tis, mis, geometric_rejection" in text]
    assert bool(warnings) == warns
