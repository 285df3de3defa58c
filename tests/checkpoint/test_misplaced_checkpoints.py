"""A run continues only from a checkpoint in its own folder, under its own name, with its files unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rltrain.checkpoint.manifest import MANIFEST, file_hashes
from rltrain.checkpoint.resume import open_run
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import RunState, write_state
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.errors import UserError

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes/policy/grpo.yaml", profile="tiny_cpu")


def run_folder(path: Path, run: str, steps: tuple[int, ...]) -> RunFolder:
    """A run folder with checkpoints after ``steps``, whose model is one file."""
    folder = RunFolder.create(path, resolved_yaml(RECIPE), {"run": run})
    for step in steps:
        checkpoint = folder.checkpoint(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_text(f"weights after {step}")
        state = RunState(
            step=step,
            learner={},
            order={},
            prompts="",
            pushes=0,
            evaluations=(),
            random=(),
            reported={},
            recipe=RECIPE.model_dump(mode="json"),
            environment={"run": run},
        )
        write_state(checkpoint, state, [("m", torch.zeros(1))])
        (checkpoint / MANIFEST).write_text(json.dumps(file_hashes(checkpoint)))
    return folder


def resume_run(folder: RunFolder, resume: str = "auto") -> tuple[str | None, list[str]]:
    """(name of the checkpoint from which the run continues, warnings)."""
    warnings: list[str] = []
    with open_run(folder, RECIPE, resume, {"run": "new"}, warnings.append) as start:
        assert start.checkpoint is None or start.checkpoint.is_dir()  # it will be loaded
        return None if start.checkpoint is None else start.checkpoint.name, warnings


@pytest.mark.parametrize("name", ["step-99", "step-3", "step-1", "step-02"])
def test_a_copy_under_another_number_is_passed_over(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    shutil.copytree(folder.checkpoint(2), folder.checkpoints / name)
    assert resume_run(folder)[0] == "step-2"


def test_a_copy_under_a_later_number_is_said_and_put_aside(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    shutil.copytree(folder.checkpoint(2), folder.checkpoint(99))
    _, warnings = resume_run(folder)
    assert "step-99 holds the state after step 2: it was copied or renamed; call it step-2" in warnings[0]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-2", "unused-step-99"]


def test_a_checkpoint_renamed_backwards_is_not_taken_for_the_earlier_step(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    shutil.rmtree(folder.checkpoint(2))
    folder.checkpoint(4).rename(folder.checkpoint(2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="call it step-4"):
        resume_run(folder)
    with pytest.raises(UserError, match="call it step-4"):
        resume_run(folder, str(folder.checkpoint(2)))
    assert sorted(tmp_path.rglob("*")) == before
    folder.checkpoint(2).rename(folder.checkpoint(4))
    assert resume_run(folder)[0] == "step-4"


@pytest.mark.parametrize("lost", ["model.safetensors", MANIFEST, "training/state.json", "training"])
def test_a_half_copied_checkpoint_is_passed_over(tmp_path: Path, lost: str) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    path = folder.checkpoint(4) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert resume_run(folder)[0] == "step-2"


def test_a_file_that_was_put_into_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    # transformers takes model.safetensors before the shards that an index names
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    (folder.checkpoint(4) / "pytorch_model.bin").write_text("other weights")
    name, warnings = resume_run(folder)
    assert name == "step-2" and "pytorch_model.bin was put there later" in warnings[0]


def test_hidden_files_of_a_file_browser_do_no_harm(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    (folder.checkpoint(4) / ".DS_Store").write_text("")
    assert resume_run(folder)[0] == "step-4"


def test_a_checkpoint_of_another_run_is_passed_over_and_the_way_to_use_it_said(tmp_path: Path) -> None:
    # Both have the same recipe, so that only the run's identifier differs.
    folder = run_folder(tmp_path / "run", "a", (2,))
    other = run_folder(tmp_path / "other", "b", (4,))
    shutil.copytree(other.checkpoint(4), folder.checkpoint(4))
    name, warnings = resume_run(folder)
    assert name == "step-2"
    assert "step-4 was written by another run" in warnings[0]
    assert f"--run NEW --resume {folder.checkpoint(4)}" in warnings[0]
    assert resume_run(RunFolder.from_path(tmp_path / "new"), str(other.checkpoint(4)))[0] == "step-4"


def test_folders_of_an_older_rltrain_go_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    folder.environment.write_text("{}")  # it wrote no identifier
    assert resume_run(folder)[0] == "step-2"
