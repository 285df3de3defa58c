"""A local worker's process: its start is watched, its end is certain, whichever process dies first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rltrain.errors import UserError
from rltrain.rollout.worker import process
from rltrain.rollout.worker.flags import Address, WorkerSettings
from rltrain.rollout.worker.process import LocalWorker, WorkerDied
from support.patience import PATIENCE

SETTINGS = WorkerSettings(model="m", dtype="float32", max_model_len=8, max_num_seqs=2, on_gpu=False)

# A server's process that starts one of its own, as vLLM does, and ignores SIGTERM, as vLLM does at its start.
LIFELINE = """
import os
from rltrain.rollout.worker import serve
serve.end_with_starter(os.environ[serve.LIFELINE])
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
"""
SILENT = STUBBORN + "time.sleep(600)\n"
CHATTY = STUBBORN + "for second in range(100):\n    print(second, flush=True)\n    time.sleep(0.1)\n"
FAILING = STUBBORN + "print('ValueError: no such model'); child.kill(); sys.exit(3)\n"
SERVING = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Starts a worker whose server is a Python script, with the real lifeline."""
    workers: list[LocalWorker] = []
    monkeypatch.setattr(process, "require_known_version", lambda: "0.32.0")
    real = subprocess.Popen

    def begin(script: str, port: int = 1) -> LocalWorker:
        code = LIFELINE + script
        monkeypatch.setattr(
            process.subprocess,
            "Popen",
            lambda command, **options: real([sys.executable, "-c", code, str(port)], **options),
        )
        worker = LocalWorker(SETTINGS, Address(port=port), "t" * 20, tmp_path / "log")
        monkeypatch.setattr(process.subprocess, "Popen", real)
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.close(0.0)


def child_of(worker: LocalWorker) -> int:
    for _ in range(100):
        words = worker.log.read_text().split()
        if len(words) > 1:
            return int(words[1])
        time.sleep(0.1)
    raise AssertionError("no child")


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_group_ends_with_a_server_that_ignores_sigterm(start) -> None:
    worker = start(SILENT)
    child = child_of(worker)
    worker.close(grace_seconds=0.3)
    assert is_gone(worker.pid) and is_gone(child)
    worker.close()


def test_what_a_dead_server_leaves_behind_ends_too(start) -> None:
    worker = start(SILENT)
    child = child_of(worker)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert psutil.pid_exists(child)
    with pytest.raises(WorkerDied, match="by SIGKILL"):
        worker.require_alive()
    worker.close()
    assert is_gone(child)


def test_neither_a_server_nor_its_folder_outlives_its_starter(tmp_path: Path) -> None:
    starter = f"""
import os, signal
from pathlib import Path
from rltrain.rollout.worker import process
from rltrain.rollout.worker.flags import Address, WorkerSettings
process.require_known_version = lambda: ""
code = {LIFELINE + SILENT!r}
real = process.subprocess.Popen
process.subprocess.Popen = lambda command, **options: real([command[0], "-c", code], **options)
settings = WorkerSettings(model="m", dtype="float32", max_model_len=8, max_num_seqs=2, on_gpu=False)
worker = process.LocalWorker(settings, Address(port=1), "t" * 20, Path({str(tmp_path / "log")!r}))
while "child" not in worker.log.read_text():
    pass
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", starter],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = int((tmp_path / "log").read_text().split()[1])
    assert is_gone(int(done.stdout)) and is_gone(child)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_folder_that_nobody_could_remove_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where starter and server were killed together; one whose starter lives stays."""
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    starter = f"""
import os
from rltrain.rollout.worker import process
process.tempfile.tempdir = {str(tmp_path)!r}
print(process.make_locked_folder()[0], flush=True)
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = Path(killed.stdout.strip())
    unfinished = tmp_path / "rltrain-worker-made-by-another"
    unfinished.mkdir()
    held, lock = process.make_locked_folder()
    assert left.is_dir()
    process.remove_left_folders()
    assert set(tmp_path.iterdir()) == {held, unfinished}
    os.close(lock)
    process.remove_left_folders()
    assert list(tmp_path.iterdir()) == [unfinished]


def test_a_start_that_writes_is_waited_for_and_a_silent_one_is_not(start) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=r"nor written to its log for 0\.5 s.*silence_seconds"):
        start(SILENT).wait_until_serving(silence_seconds=0.5)
    assert time.monotonic() - begin < PATIENCE
    worker = start(CHATTY)
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match="told to stop"):
        worker.wait_until_serving(5.0, should_stop=lambda: time.monotonic() - begin > 6.0)


def test_the_log_says_why_a_start_failed(start) -> None:
    with pytest.raises(WorkerDied, match=r"exit code 3: ValueError: no such model\nthe last lines") as error:
        start(FAILING).wait_until_serving()
    assert "t" * 20 not in str(error.value)


def test_a_server_that_answers_serves(start) -> None:
    worker = start(SERVING, process.find_free_port())
    worker.wait_until_serving(30.0)
    worker.require_alive()
    worker.close()
    with pytest.raises(WorkerDied, match="by SIGTERM"):
        worker.require_alive()


def test_a_socket_left_behind_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(UserError, match=r"listens at .* already"):
            process._remove_stale_socket(Address(socket=path))
    process._remove_stale_socket(Address(socket=path))
    assert not path.exists()
    process._remove_stale_socket(Address(socket=path))
