"""The numbers of every golden run are the recorded ones, unless someone renewed the records."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import script

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    """scripts/golden.py as a module."""
    return script("golden")


@pytest.fixture(scope="module")
def model(golden: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.tiny_model(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize(
    "name", [name if name == "grpo" else pytest.param(name, marks=pytest.mark.slow) for name in KEPT]
)
def test_the_numbers_are_the_kept_ones(name: str, golden: ModuleType, model: Path, tmp_path: Path) -> None:
    kept = golden.read(golden.GOLDEN / f"{name}.json")
    assert (kept["recipe"], kept["settings"]) == (golden.recipe_of(name), golden.settings_of(name))
    complaint = golden.verdict(name, kept, golden.run(name, model, tmp_path / "run"))
    assert complaint is None, complaint
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    apart = [line["rollout/mismatch_abs"] for line in lines if "rollout/mismatch_abs" in line]
    assert len(apart) == (3 if golden.samples(name) else 0)
    assert max(apart, default=0.0) < 1e-4  # engine and learner compute the same log-probs


def test_there_is_something_to_compare(golden: ModuleType) -> None:
    for name in KEPT:
        steps = json.loads((Path(__file__).parent / f"{name}.json").read_text())["steps"]
        sampled = {"learner/entropy_mean", "reward/mean"} if golden.samples(name) else set()
        judged = set()
        if not golden.recipe_of(name).startswith("policy/"):
            judged = set(steps) & {"loss/margin", "loss/reward", "loss/z0"}
        assert set(steps) == {"loss/total", "learner/grad_norm"} | sampled | judged and (sampled or judged)
        assert all(len(values) == 3 for values in steps.values())
        assert all(norm > 1e-3 for norm in steps["learner/grad_norm"]), name
    assert set(KEPT) == set(golden.every_name())


def test_every_kind_of_recipe_is_named(golden: ModuleType) -> None:
    for name in golden.every_name():
        assert (ROOT / "recipes" / f"{golden.recipe_of(name)}.yaml").is_file()
    kinds = {(golden.recipe_of(name).partition("/")[0], golden.samples(name)) for name in golden.every_name()}
    assert kinds == {("policy", True), ("preference", False), ("preference", True), ("process_reward", False)}
    assert golden.recipe_of("osp") == "preference/osp"  # not on the list: found in its folder
    with pytest.raises(SystemExit, match="no recipe is called 'nothing'"):
        golden.recipe_of("nothing")


def test_the_message_says_how_to_renew(golden: ModuleType) -> None:
    kept = {"environment": golden.environment(), "steps": {"loss/total": [1.0, 2.0]}}
    equal = {"loss/total": [1.0, 2.0]}
    rounded = {"loss/total": [1.0, 2.0000002]}
    other = {"loss/total": [1.0, 2.1]}
    assert golden.verdict("grpo", kept, equal) is None
    assert "loss/total, step 2: 2.0 before, 2.0000002 now (relative 1.0e-07)" in golden.verdict(
        "grpo", kept, rounded
    )
    elsewhere = kept | {"environment": kept["environment"] | {"processor": "another"}}
    assert golden.verdict("grpo", elsewhere, rounded) is None  # 1e-7 is rounding, 5e-2 is not
    assert "held to 0.001" in golden.verdict("grpo", elsewhere, other)
    assert "python scripts/golden.py make grpo" in golden.verdict("grpo", elsewhere, other)
    assert golden.differences({"loss/total": [1.0]}, {"loss/total": [1.0, 2.0]}, exact=False) == [
        "loss/total: 1 steps before, 2 now"
    ]


def test_two_run_folders_can_be_compared(
    golden: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, loss in (("one", 1.0), ("two", 1.5)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": 0, "eval/reward": 0.0},
            {"step": 1, "learner/lr": 0.1, **dict.fromkeys(golden.METRICS, loss)},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert golden.compare(str(tmp_path / "one"), str(tmp_path / "one"), []) == 0
    assert golden.compare(str(tmp_path / "one"), str(tmp_path / "two"), []) == 1
    assert "loss/total, step 1: 1.0 before, 1.5 now" in capsys.readouterr().out


@pytest.mark.slow
def test_a_commit_is_asked_with_its_own_code(golden: ModuleType) -> None:
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    if shutil.which("git") is None or subprocess.run(head, capture_output=True).returncode != 0:
        pytest.skip(reason="compares commits, and this copy of the project has no git history")
    numbers = golden.numbers_of("HEAD", ["grpo", "a recipe that it does not have"])
    assert set(numbers) == {"grpo"}
    assert golden.verdict("grpo", golden.read(golden.GOLDEN / "grpo.json"), numbers["grpo"]) is None
    with pytest.raises(SystemExit, match="'no-such-commit' is neither a folder nor a commit"):
        golden.numbers_of("no-such-commit", ["grpo"])
