"""A run folder is created completely or not at all, and never over an existing file."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rltrain.checkpoint.run_folder import RunFolder, describe_environment, directory_atomic, write_atomic
from rltrain.errors import UserError

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_new_run_holds_its_recipe_and_environment(tmp_path):
    folder = RunFolder.create(tmp_path / "runs" / "grpo", "seed: 1\n", {"python": "3.11"})
    assert contents(folder.path) == {
        "recipe.resolved.yaml": b"seed: 1\n",
        "environment.json": b'{\n  "python": "3.11"\n}\n',
    }
    assert sorted(path.name for path in folder.path.parent.iterdir()) == ["grpo"]  # no temporary left


def test_an_empty_folder_may_become_a_run(tmp_path):
    assert RunFolder.create(tmp_path, "seed: 1\n", {}).recipe.read_text() == "seed: 1\n"


def test_an_existing_run_is_refused_and_untouched(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n", {})
    folder.metrics.write_text('{"step": 1}\n')
    before = contents(folder.path)
    with pytest.raises(UserError, match="already holds a run; choose another --run"):
        RunFolder.create(folder.path, "seed: 2\n", {})
    assert contents(folder.path) == before


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UserError, match=r"thesis\.tex.*choose another --run"):
        RunFolder.create(tmp_path, "seed: 1\n", {})
    assert contents(tmp_path) == {"thesis.tex": b"important"}


@pytest.mark.parametrize("below", ["", "run"], ids=["a file", "below a file"])
def test_a_file_in_the_way_is_refused_and_untouched(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("important")
    with pytest.raises(UserError, match="choose"):
        RunFolder.create(file / below, "seed: 1\n", {})
    assert file.read_text() == "important"


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="choose another --run"):
        RunFolder.create(tmp_path / "run", "seed: 1\n", {})
    assert not (tmp_path / "gone").exists()


def test_a_read_only_parent_is_one_clear_error():
    # Permissions do not bind root, so a child process that has given up root makes the attempt, in a folder
    # of its own.
    code = "from rltrain.checkpoint.run_folder import RunFolder\n"
    code += "from rltrain.errors import UserError\n"
    code += "import os, sys\n"
    code += "os.geteuid() or os.seteuid(65534)\n"
    code += "try: RunFolder.create(sys.argv[1], 'seed: 1', {})\nexcept UserError as error: print(error)"
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o555)
        result = subprocess.run(
            [sys.executable, "-c", code, f"{parent}/run"], cwd=ROOT, capture_output=True, text=True
        )
        os.chmod(parent, 0o755)
        assert re.search("cannot be written .Permission denied.*choose a --run that can be", result.stdout), (
            result.stderr
        )
        assert os.listdir(parent) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk died")))
    with pytest.raises(OSError, match="disk died"):
        write_atomic(path, "new")
    assert contents(tmp_path) == {"state.json": b"old"}


def test_a_written_file_has_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "a", b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with directory_atomic(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not (tmp_path / "model").exists()
    assert contents(tmp_path) == {"model/sub/a": b"1"}
    with pytest.raises(ZeroDivisionError), directory_atomic(tmp_path / "other") as temporary:
        (temporary / "a").write_text("1")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"model/sub/a": b"1"} and [path.name for path in tmp_path.iterdir()] == [
        "model"
    ]


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"), directory_atomic(tmp_path / "model"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="exists already"), directory_atomic(tmp_path / "late") as temporary:
        (temporary / "mine").write_text("1")
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("2")
    assert contents(tmp_path) == {"late/theirs": b"2"}


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path):
    code = "import os, sys, signal\n"
    code += "from pathlib import Path\n"
    code += "from rltrain.checkpoint.run_folder import directory_atomic\n"
    code += (
        "with directory_atomic(Path(sys.argv[1])) as temporary:\n    (temporary / 'half').write_text('1')\n"
    )
    code += "    os.kill(os.getpid(), signal.SIGKILL)"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    RunFolder.create(tmp_path / "model", "seed: 1\n", {})  # and nothing prevents a new folder of that name


def test_the_environment_names_versions_machine_and_commit():
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    import torch

    assert environment["packages"]["torch"] == torch.__version__
    assert (
        environment["python"] == ".".join(map(str, sys.version_info[:3]))
        and environment["cpus"] == os.cpu_count()
    )
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert environment["commit"].removesuffix("-dirty") == head.stdout.strip()
    else:
        assert environment["commit"] is None  # an archive of the sources has no history


def test_a_commit_is_only_named_when_git_tracks_the_sources(tmp_path):
    from rltrain.checkpoint.run_folder import _commit

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "__init__.py").touch()  # installed below somebody else's repository, not part of it
    assert _commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", _commit(tmp_path))
    (tmp_path / "__init__.py").write_text("edited")
    assert re.fullmatch("[0-9a-f]{40}-dirty", _commit(tmp_path))


def test_pruning_keeps_the_latest_by_step_number_not_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 10, 9, 100):
        folder.checkpoint(step).mkdir(parents=True)
    folder.prune_checkpoints(2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-10", "step-100"]
