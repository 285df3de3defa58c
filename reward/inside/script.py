"""Runs a complete program under test: it reads standard input, prints, and ends.

The expected output is never in this process.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import os
import socket
import sys
import threading
from typing import Any, NoReturn


def set_standard_input(text: str) -> None:
    """Makes a read-only file with ``text`` the standard input.

    Called before the limits are set, which would count the file as the program's own.
    """
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", errors="replace"))
    fcntl.fcntl(
        descriptor,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
    )
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)


def run(channel: socket.socket, source: str) -> NoReturn:
    """Runs a program and ends as Python itself would: with exit handlers called, threads joined and output
    written."""
    os.dup2(channel.fileno(), 1)
    channel.close()
    sys.stdin = sys.__stdin__ = os.fdopen(0, "r", encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["program"]
    for name in ("exit", "quit"):  # defined by the module site, which is not imported here
        setattr(builtins, name, sys.exit)
    status = _run_program(source, vars(main))
    os._exit(_run_exit_steps(vars(main)) or status)


def _run_program(source: str, namespace: dict[str, Any]) -> int:
    try:
        exec(compile(source, "program", "exec", dont_inherit=True), namespace)
    except SystemExit as end:
        return end.code % 256 if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # like Python, exit with 1 on any exception other than SystemExit
        return 1
    return 0


def _run_exit_steps(namespace: dict[str, Any]) -> int:
    """Does what Python does at a program's end, but not its full teardown, which takes longer than most
    programs run. Returns 1 on an error.
    """
    try:
        current = threading.current_thread()
        while others := [
            thread for thread in threading.enumerate() if thread is not current and not thread.daemon
        ]:
            others[0].join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        namespace.clear()  # files that are still open write their buffers
    except BaseException:  # exit handlers and open files are the program's own and may raise anything
        return 1
    return 0
