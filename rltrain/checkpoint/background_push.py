"""Pushes of checkpoints to the Hub while training goes on, one at a time."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rltrain.checkpoint.run_folder import temporary_path
from rltrain.checkpoint.run_state import TRAINING
from rltrain.errors import UserError

__all__ = ["BackgroundPush"]

# a file system without hard links, one whose links are used up, or another file system
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})


@dataclass
class BackgroundPush:
    """Pushes every ``every``-th step's checkpoint, a model folder. A failure is a warning.

    push: uploads a model folder of the run after some steps and returns a line to report. The main process
    alone has one.
    """

    every: int
    push: Callable[[Path, int], str]
    report: Callable[[str], None]
    warn: Callable[[str], None]
    _running: threading.Thread | None = None
    _running_name: str = field(default="")

    def start(self, checkpoint: Path, step: int) -> None:
        """Begin to push ``checkpoint`` if its step is due; a push that still runs is not disturbed.

        The files are linked first, so that the checkpoint may be removed when this returns.
        """
        if step % self.every:
            return
        if self._running is not None and self._running.is_alive():
            self.warn(f"{checkpoint.name} is not pushed: the push of {self._running_name} still runs")
            return
        try:
            links = link_model(checkpoint)
        except OSError as error:
            self.warn(f"{checkpoint.name} is not pushed: {error}")
            return
        self._running_name = checkpoint.name
        # a daemon: a run that ends does not wait, and the next push finishes what this one began
        self._running = threading.Thread(target=self._run, args=(links, step), name="push", daemon=True)
        self._running.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when no push runs, or after ``seconds``."""
        if self._running is not None:
            self._running.join(seconds)

    def _run(self, model: Path, step: int) -> None:
        try:
            self.report(f"{self._running_name}: {self.push(model, step)}")
        except (UserError, OSError) as error:
            self.warn(f"{self._running_name} is not pushed, a later push will be: {error}")
        finally:
            shutil.rmtree(model, ignore_errors=True)


def link_model(checkpoint: Path) -> Path:
    """A hidden folder beside ``checkpoint`` with hard links to the files of its model, or copies where the
    file system has no links. A killed run leaves it; the next start removes it. Raises OSError.
    """
    links = temporary_path(checkpoint)
    try:
        for path in sorted(checkpoint.rglob("*")):
            name = path.relative_to(checkpoint)
            if not path.is_file() or name.parts[0] == str(TRAINING):
                continue
            target = links / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
    except BaseException:
        shutil.rmtree(links, ignore_errors=True)
        raise
    return links


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, target)
