"""A whole program under test: it reads standard input, prints, and ends.

What it should print is nowhere in here.
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


def take_input(text: str) -> None:
    """Standard input becomes a file of ``text`` that nobody can write.

    Before the limits, which would count it as the program's own.
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
    """Ends as Python itself would, with what is registered for the end, threads waited for and output
    written.
    """
    os.dup2(channel.fileno(), 1)
    channel.close()
    sys.stdin = sys.__stdin__ = os.fdopen(0, "r", encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = ["program"]
    for name in ("exit", "quit"):  # of the module site, which is not imported here
        setattr(builtins, name, sys.exit)
    status = _status_of(source, vars(main))
    os._exit(_finished(vars(main)) or status)


def _status_of(source: str, namespace: dict[str, Any]) -> int:
    try:
        exec(compile(source, "program", "exec", dont_inherit=True), namespace)
    except SystemExit as end:
        return end.code % 256 if isinstance(end.code, int) else int(end.code is not None)
    except (
        BaseException
    ):  # the program's own code: whatever it raises but SystemExit ends it with 1, as Python does
        return 1
    return 0


def _finished(namespace: dict[str, Any]) -> int:
    """What Python does at a program's end, without taking all of itself apart, which takes longer
    than most programs run.
    """
    try:
        me = threading.current_thread()
        while others := [one for one in threading.enumerate() if one is not me and not one.daemon]:
            others[0].join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        namespace.clear()  # files that are still open write what they hold
    except (
        BaseException
    ):  # what the program registered for its end, and the files it left open, are its own as well
        return 1
    return 0
