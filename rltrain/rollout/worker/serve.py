"""The process of a vLLM server: ``python -m rltrain.rollout.worker.serve FLAGS``.

It ends with the process that started it, and vLLM's own processes end with it. Its standard input is a pipe
that the starter keeps open and never writes to; when the starter dies, however it dies, the pipe ends. vLLM
starts its engine processes by ``spawn``, which imports this module in each of them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
LIFELINE = "RLTRAIN_LIFELINE"  # where standard input is such a pipe: the starter's folder for this process


def end_with_parent() -> None:
    """Lets the kernel end this process when its parent dies (Linux only)."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died in between
        os._exit(1)


def end_with_starter(folder: str) -> None:
    """Removes ``folder`` and ends this process group when the pipe at standard input ends."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="rltrain-lifeline", daemon=True).start()


def main() -> None:
    if folder := os.environ.pop(LIFELINE, ""):
        end_with_starter(folder)
    # `vllm serve` asks for the package "vllm", which the CPU build does not have
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    end_with_parent()
