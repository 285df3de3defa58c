"""Pushes in the background disturb neither the run nor one another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rltrain.checkpoint import background_push
from rltrain.checkpoint.background_push import BackgroundPush, link_model
from rltrain.checkpoint.run_folder import RunFolder
from rltrain.errors import UserError


def make_checkpoint(folder: RunFolder, step: int) -> Path:
    checkpoint = folder.checkpoint(step)
    (checkpoint / "training").mkdir(parents=True)
    (checkpoint / "training/state.json").write_text("{}")
    (checkpoint / "process_reward").mkdir()
    (checkpoint / "process_reward/config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights of step %d" % step)
    return checkpoint


def test_one_push_runs_at_a_time_and_reads_a_checkpoint_that_is_removed_meanwhile(tmp_path: Path):
    folder = RunFolder(tmp_path)
    started, go_on = threading.Event(), threading.Event()
    pushed: list[tuple[int, bytes, list[str]]] = []
    lines: list[str] = []

    def push(model: Path, step: int) -> str:
        started.set()
        assert go_on.wait(60)
        names = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
        pushed.append((step, (model / "model.safetensors").read_bytes(), names))
        return "pushed"

    pushes = BackgroundPush(2, push, lines.append, lines.append)
    pushes.start(make_checkpoint(folder, 1), 1)
    assert not started.is_set()
    pushes.start(make_checkpoint(folder, 2), 2)
    assert started.wait(60)
    pushes.start(make_checkpoint(folder, 4), 4)
    assert lines == ["step-4 is not pushed: the push of step-2 still runs"]
    folder.prune_checkpoints(1)
    assert not folder.checkpoint(2).exists()
    go_on.set()
    pushes.wait()
    assert pushed == [(2, b"weights of step 2", ["model.safetensors", "process_reward/config.json"])]
    assert lines[1:] == ["step-2: pushed"]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"]


def test_a_push_that_fails_is_a_warning(tmp_path: Path):
    warnings: list[str] = []

    def push(model: Path, step: int) -> str:
        raise UserError("the Hub did not answer")

    pushes = BackgroundPush(1, push, pytest.fail, warnings.append)
    pushes.start(make_checkpoint(RunFolder(tmp_path), 1), 1)
    pushes.wait()
    assert warnings == ["step-1 is not pushed, a later push will be: the Hub did not answer"]


def test_a_file_system_without_links_gets_copies_and_a_killed_push_is_cleared(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(background_push.errno.EXDEV, "other file system")

    monkeypatch.setattr(background_push.os, "link", refuse)
    folder = RunFolder(tmp_path)
    links = link_model(make_checkpoint(folder, 1))
    assert (links / "model.safetensors").read_bytes() == b"weights of step 1"
    folder.rewind({})
    assert not links.exists()
