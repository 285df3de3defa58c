"""A checkpoint counts where it was written, under its own name, with the files that were written:
nothing else is gone on from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rltrain.checkpoint.export import MANIFEST, file_hashes
from rltrain.checkpoint.resume import open_run
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.checkpoint.run_state import RunState, write_state
from rltrain.config.load import load_recipe, resolved_yaml
from rltrain.errors import UserError

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes/policy/grpo.yaml", profile="tiny_cpu")


def run_folder(path: Path, run: str, steps: tuple[int, ...]) -> RunFolder:
    """A run folder with checkpoints after ``steps``, of a model of one file."""
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


def resumed(folder: RunFolder, resume: str = "auto") -> tuple[str | None, list[str]]:
    """(name of the checkpoint that is gone on from, what was said)."""
    said: list[str] = []
    with open_run(folder, RECIPE, resume, {"run": "new"}, said.append) as start:
        assert start.checkpoint is None or start.checkpoint.is_dir()  # the place that will be loaded
        return None if start.checkpoint is None else start.checkpoint.name, said


@pytest.mark.parametrize("name", ["step-99", "step-3", "step-1", "step-02"])
def test_a_copy_under_another_number_is_passed_over(tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    shutil.copytree(folder.checkpoint(2), folder.checkpoints / name)
    assert resumed(folder)[0] == "step-2"


def test_a_copy_under_a_later_number_is_said_and_put_aside(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    shutil.copytree(folder.checkpoint(2), folder.checkpoint(99))
    _, said = resumed(folder)
    assert "step-99 holds the state after step 2: it was copied or renamed; call it step-2" in said[0]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-2", "unused-step-99"]


def test_a_checkpoint_renamed_backwards_is_not_taken_for_the_earlier_step(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    shutil.rmtree(folder.checkpoint(2))
    folder.checkpoint(4).rename(folder.checkpoint(2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="call it step-4"):
        resumed(folder)
    with pytest.raises(UserError, match="call it step-4"):
        resumed(folder, str(folder.checkpoint(2)))
    assert sorted(tmp_path.rglob("*")) == before
    folder.checkpoint(2).rename(folder.checkpoint(4))
    assert resumed(folder)[0] == "step-4"


@pytest.mark.parametrize("lost", ["model.safetensors", MANIFEST, "training/state.json", "training"])
def test_a_half_copied_checkpoint_is_passed_over(tmp_path: Path, lost: str) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    path = folder.checkpoint(4) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert resumed(folder)[0] == "step-2"


def test_a_file_that_was_put_into_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    # transformers takes model.safetensors before the shards that an index names
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    (folder.checkpoint(4) / "pytorch_model.bin").write_text("other weights")
    name, said = resumed(folder)
    assert name == "step-2" and "pytorch_model.bin was put there later" in said[0]


def test_hidden_files_of_a_file_browser_do_no_harm(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2, 4))
    (folder.checkpoint(4) / ".DS_Store").write_text("")
    assert resumed(folder)[0] == "step-4"


def test_a_checkpoint_of_another_run_is_passed_over_and_the_way_to_use_it_said(tmp_path: Path) -> None:
    # the same recipe, so that nothing but the run's own mark tells them apart
    folder, other = run_folder(tmp_path / "run", "a", (2,)), run_folder(tmp_path / "other", "b", (4,))
    shutil.copytree(other.checkpoint(4), folder.checkpoint(4))
    name, said = resumed(folder)
    assert name == "step-2"
    assert (
        "step-4 was written by another run" in said[0]
        and f"--run NEW --resume {folder.checkpoint(4)}" in said[0]
    )
    assert resumed(RunFolder.at(tmp_path / "new"), str(other.checkpoint(4)))[0] == "step-4"


def test_folders_of_an_older_rltrain_go_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "a", (2,))
    folder.environment.write_text("{}")  # it wrote no mark
    assert resumed(folder)[0] == "step-2"
