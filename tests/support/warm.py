"""Programs in processes that have their imports behind them.

A test that starts ``python -m rltrain`` spends most of its processor time on importing torch and
transformers. Here such a program is a fork of one process, started once, that has imported them and done
nothing else: its environment, folder, arguments, output and exit code are its own, as after
``subprocess.run``. What the start itself is about (``accelerate launch``, an installed wheel, modules that
must not be imported) is tested by programs that start cold.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# what most of the programs have imported at their end, and what the fake workers need
IMPORTED = (
    "accelerate",
    "deepspeed",
    "pandas",
    "peft",
    "pyarrow.parquet",
    "pytest",
    "rltrain.cli.app",
    "rltrain.cli.train",
    "support.fake_server",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "uvicorn",
)
changing_environment = threading.Lock()  # that of this process, for a moment


def warm_context() -> ForkServerContext:
    """The context whose processes have imported IMPORTED."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    fixed = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Libraries read them when they are imported. A second thread would take them for the process's own.
    with changing_environment, mock.patch.dict(os.environ, fixed):
        forkserver.ensure_running()
    return context


def own_environment() -> dict[str, str]:
    """That of this process, without a launcher's words, for a program below the project's folder."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Program:
    """``python ARGUMENTS`` in ``folder``, started warm: a script or ``-m MODULE``, and what follows it. Its
    methods are those of subprocess.Popen. environment: ``own_environment()`` if None.
    """

    def __init__(
        self, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path = ROOT
    ) -> None:
        self.arguments = list(arguments)
        scratch = tempfile.mkdtemp(prefix="warm-")
        weakref.finalize(self, shutil.rmtree, scratch)
        self._printed = [Path(scratch) / end for end in ("out", "err")]
        for path in self._printed:
            path.touch()
        words = dict(own_environment() if environment is None else environment)
        self._process = warm_context().Process(
            target=_run, args=(self.arguments, words, folder, *self._printed)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def sentinel(self) -> int:
        """Ready, for multiprocessing.connection.wait, when the program has ended."""
        return self._process.sentinel

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired with what was printed."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0, *self.printed())
        return code

    def printed(self) -> tuple[str, str]:
        """What is in its output and its errors by now."""
        out, err = (path.read_text(errors="replace") for path in self._printed)
        return out, err

    def completed(self) -> subprocess.CompletedProcess[str]:
        """Of a program that has ended."""
        return subprocess.CompletedProcess(self.arguments, self.wait(), *self.printed())


def run_program(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """The program, ended. Raises subprocess.TimeoutExpired, after the process was killed."""
    program = Program(arguments, environment=environment, folder=folder)
    try:
        program.wait(timeout)
        return program.completed()
    finally:
        program.kill()


def run_together(
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    folder: Path = ROOT,
    timeout: float = 900,
) -> list[subprocess.CompletedProcess[str]]:
    """One process for each of ``environments``; the others are killed when one fails, as launchers do."""
    programs = [Program(arguments, environment=environment, folder=folder) for environment in environments]
    end = time.monotonic() + timeout
    try:
        while not any(program.poll() for program in programs):
            running = [program for program in programs if program.poll() is None]
            if not running:
                break
            if not wait([program.sentinel for program in running], max(end - time.monotonic(), 0)):
                running[0].wait(0)  # raises
    finally:
        for program in programs:
            program.kill()
    return [program.completed() for program in programs]


def _run(arguments: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    """In the new process: becomes the program."""
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    tempfile.tempdir = None  # TMPDIR is read again
    os.environ.clear()
    os.environ.update(environment)
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    # as the interpreter does it: the current folder for a module, the script's own for a script
    first = str(folder) if module else str(Path(arguments[0]).resolve().parent)
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *_installed()]
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without


def _installed() -> list[str]:
    """The search path of an interpreter without PYTHONPATH."""
    return [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]
