"""A finished run is trained again from its journal, to the bit; other methods learn from its samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rltrain.build import rollout as rollout_parts
from rltrain.checkpoint.journal import Journal, StepRecord
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.cli.measured_plan import measured_command
from rltrain.cli.replay import parse_steps, plan_command, replay_command
from rltrain.cli.train import train_command
from rltrain.config.load import load_recipe
from rltrain.config.rules import check
from rltrain.errors import RecipeError, UserError
from support.resumed_runs import differing, lines

POLICY = Path(__file__).parents[2] / "recipes/policy"
SEVENS = f"{Path(__file__).parents[1] / 'golden/sevens.py'}:sevens"
COUNTING = f"{Path(__file__).parents[1] / 'support/environments.py'}:Counting"
SETTINGS = (
    *("train.steps=4", "checkpoint.every=2", "learner.optimizer.lr=2e-3", "reward.workers=1"),
    *("rollout.prompts=8", "rollout.n=4", "eval.prompts=4", "eval.n=2", "eval.k=[1]", "eval.every=2"),
)


def train(folder: Path, model: str, recipe: str, *overrides: str) -> Path:
    settings = [f"model.path={model}", f"reward.functions=['{SEVENS}']", *SETTINGS, *overrides]
    loaded = check(load_recipe(POLICY / f"{recipe}.yaml", profile="tiny_cpu", overrides=settings)).recipe
    assert train_command(loaded, folder, []) == 0
    return folder


def replay(
    run: Path, steps: tuple[int, int] | None, keys: list[str], out: Path | None, *, is_check: bool
) -> int:
    return replay_command(plan_command(run, steps, keys, check=is_check), out, check=is_check)


@pytest.fixture(scope="module")
def grpo(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("replay") / "grpo", random_model, "grpo")


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A replay starts no engine; the runs themselves are trained before, or in ``trained``."""

    def refuse(*_: object) -> Any:
        pytest.fail("a replay started an engine")

    if "recorded" not in request.fixturenames:
        request.getfixturevalue("grpo")
        monkeypatch.setattr(rollout_parts, "build_engine", refuse)
    yield


AAPO = ("advantage=aapo", "loss.policy=reinforce", "loss.terms=[]", "rollout.extra_samples=[reference]")
EPISODES = (
    f"rollout.environment={{name: '{COUNTING}', turns: 2, max_turns: 3, turn_tokens: 4, workers: 1}}",
    "rollout.max_tokens=32",
)


@pytest.fixture(
    params=[
        pytest.param(("aepo", "learner.updates=2"), id="aepo"),
        pytest.param(("grpo", *AAPO), id="aapo"),
        pytest.param(("empg", *EPISODES), id="empg on episodes"),
    ]
)
def recorded(request: pytest.FixtureRequest, random_model: str, tmp_path: Path) -> Path:
    return train(tmp_path / "run", random_model, *request.param)


def test_runs_of_every_source_are_replayed_to_the_bit(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(recorded, None, [], None, is_check=True) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "equal to the bit: the weights before each of steps 1 to 4, its metrics, 3 evaluations, and the "
        "finished" in printed
    )


def test_steps_after_a_checkpoint_are_replayed(grpo: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert replay(grpo, (3, 4), [], out, is_check=False) == 0
    assert not differing(grpo, out, "model/model.safetensors")
    taken = [(line["step"], "eval/reward" in line) for line in lines(out)]
    assert taken == [(3, False), (4, False), (4, True)]
    assert (out / "report.html").exists()


def test_its_steps_are_measured(grpo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(grpo / "recipe.resolved.yaml")
    assert measured_command(recipe, grpo, None, as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["measured"]["steps"] == [2, 4] and content["measured"]["learners"] == 1
    assert content["step_seconds"] == pytest.approx(
        sum(content["measured"][name] for name in ("sampling", "learning", "push"))
    )
    assert content["sampling_seconds"] > 0 and content["learning_seconds"] > 0
    steps = [line for line in lines(grpo) if line["step"] > 1 and "rollout/tokens" in line]
    mean = sum(line["rollout/tokens"] for line in steps) / len(steps)
    assert content["measured"]["tokens"] == pytest.approx(mean)


def test_a_difference_is_found_and_named(
    grpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One reward of step 2 is another: everything after it differs."""
    run = tmp_path / "run"
    shutil.copytree(grpo, run)
    journal = Journal(RunFolder(run))
    record = journal.read(2)
    group = next(group for group in record.groups if len({score.value for score in group.scores}) > 1)
    turned = tuple(reversed(group.scores))
    changed = [dataclasses.replace(each, scores=turned) if each is group else each for each in record.groups]
    journal.write(StepRecord(record.header, tuple(changed)))
    assert replay(run, None, [], None, is_check=True) == 1
    printed = capsys.readouterr().out
    assert "step 3: the weights before it are others" in printed
    assert "step 2: the weights" not in printed
    assert "the finished model has other weights" in printed


def test_an_evaluation_that_differs_is_found(
    grpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One held-out reward is another; of two evaluations there are no completions any more."""
    run = tmp_path / "run"
    shutil.copytree(grpo, run)
    journal = Journal(RunFolder(run))
    assert journal.evaluated_versions() == [0, 2, 4]
    record = journal.read_evaluation(4)
    first = record.groups[0]
    scores = tuple(dataclasses.replace(score, value=score.value + 1) for score in first.scores)
    changed = (dataclasses.replace(first, scores=scores), *record.groups[1:])
    journal.write_evaluation(dataclasses.replace(record, groups=changed))
    for version in (0, 2):
        journal.evaluation_path(version).unlink()
    assert replay(run, None, [], None, is_check=True) == 1
    printed = capsys.readouterr().out
    assert "step 4: eval/reward is" in printed and "step 2: eval" not in printed
    assert "the weights" not in printed

    journal.write_evaluation(dataclasses.replace(record, weights="others"))
    assert replay(run, None, [], None, is_check=True) == 1
    assert "the weights that were evaluated after 4 updates are others" in capsys.readouterr().out


def test_held_out_completions_of_another_version_are_refused(grpo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(grpo, run)
    journal = Journal(RunFolder(run))
    journal.evaluation_path(2).write_bytes(journal.evaluation_path(4).read_bytes())
    with pytest.raises(UserError, match=r"evaluation-000002\.parquet holds completions of version 4"):
        replay(run, None, [], None, is_check=True)
    journal.evaluation_path(2).write_bytes(b"")
    with pytest.raises(UserError, match=r"evaluation-000002\.parquet is damaged"):
        journal.read_evaluation(2)


def test_another_method_learns_from_the_same_samples(
    grpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rloo"
    keys = ["advantage=rloo", "learner.optimizer.lr=5e-2"]
    assert replay(grpo, None, keys, out, is_check=False) == 0
    content = json.loads((out / "replay.json").read_text())
    by_step = {row["step"]: row for row in content["steps"]}
    assert [*by_step] == [1, 2, 3, 4]
    # the first step's samples are the policy's own
    assert by_step[1]["rollout/ess_completions"] == pytest.approx(1, abs=1e-4)
    assert by_step[1]["rollout/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert by_step[4]["rollout/ess_completions"] < 0.2
    assert 4 in content["low"] and 1 not in content["low"]
    assert "below 0.2: samples of another policy" in capsys.readouterr().out
    assert "those samples are another policy" in (out / "report.html").read_text()
    rows = {line["step"]: line for line in lines(out) if "reward/mean" in line}
    recorded = {line["step"]: line for line in lines(grpo) if "reward/mean" in line}
    assert [rows[step]["reward/mean"] for step in rows] == [recorded[step]["reward/mean"] for step in rows]
    assert "trust_logp: true" in (out / "recipe.resolved.yaml").read_text()  # the ratio to who sampled


@pytest.mark.parametrize(
    ("steps", "keys", "error"),
    [
        ((2, 4), [], "first steps that can be replayed: 1, and after checkpoints 3, 5"),
        ((1, 9), [], "has steps 1 to 4; step 5 has no file"),
        (None, ["rollout.temperature=0.5"], r"replay --set rollout\.temperature: the samples are there"),
        (None, ["advantage=no_such"], "no_such"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_a_model_is_loaded(
    steps: Any, keys: list[str], error: str, grpo: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, RecipeError), match=error):
        replay(grpo, steps, keys, tmp_path / "out", is_check=False)
    assert not (tmp_path / "out").exists()


def test_check_and_set_exclude_each_other(grpo: Path) -> None:
    with pytest.raises(UserError, match="leave --set out"):
        replay(grpo, None, ["advantage=rloo"], None, is_check=True)


def test_a_run_without_a_journal_is_refused(tmp_path: Path, grpo: Path) -> None:
    shutil.copytree(grpo, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
    with pytest.raises(UserError, match=r"has no journal \(rollouts/\).*journal\.keep"):
        replay(tmp_path / "run", None, [], None, is_check=True)


@pytest.mark.parametrize("text", ["", "a..b", "3..", "..4", "-1"])
def test_steps_are_two_numbers(text: str) -> None:
    with pytest.raises(UserError, match=r"as in 3\.\.9"):
        parse_steps(text)
    assert parse_steps("3..9") == (3, 9) and parse_steps("3") == (3, 3) and parse_steps(None) is None
