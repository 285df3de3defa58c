"""Isolates processes before they run untrusted code.

fork server (imports once, then forks) -> launcher (new namespaces, a root folder of its own) -> init (process
1: when it ends, all end) -> sandboxed process (limits, no privileges). A control socket carries the job in,
"ready" and "go" across, and a tester's verdict out. When the grader closes it, init ends; when all processes
have ended, the launcher closes its own end.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from rltrain.reward.inside import kernel, program, script, tester
from rltrain.reward.inside.names import DEVICES, NOBODY
from rltrain.reward.inside.wire import Hangup, receive_message, send_message

JOB_LIMIT = 1 << 26  # bytes
OWN_PROCESSES = 3  # launcher, init and sandboxed process, which all count for the program's user

_NEW_ROOT = "/tmp"  # any existing folder: only this process sees the mount there


def serve_forks(descriptor: int) -> NoReturn:
    """Forks a launcher for every received pair (control, channel) of descriptors, until the grader hangs
    up."""
    requests = socket.socket(fileno=descriptor)
    hard_limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # The grader's own limit is for one completion; this process serves all completions.
    resource.setrlimit(resource.RLIMIT_CPU, (hard_limit, hard_limit))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kernel.die_with_parent(signal.SIGKILL)
            launch(socket.socket(fileno=descriptors[0]), socket.socket(fileno=descriptors[1]))
        for descriptor in descriptors:
            os.close(descriptor)


def launch(control: socket.socket, channel: socket.socket) -> NoReturn:
    try:
        job = receive_message(control, JOB_LIMIT)
        if job["kind"] == "bubblewrap":
            _start_bubblewrap(control, channel, job)
        isolate(job)
        kernel.die_with_parent(signal.SIGKILL)  # the change of user has cancelled the earlier call
        child = os.fork()
        if child == 0:
            kernel.die_with_parent(signal.SIGKILL)
            run_init(control, channel, job)
        channel.close()
        os.waitpid(child, 0)
    except (OSError, ValueError) as error:
        send_message(control, {"failed": f"{type(error).__name__}: {error}"}, JOB_LIMIT)
    except Hangup:
        os._exit(1)
    os._exit(0)


def run_init(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> NoReturn:
    """Init, and its child, the sandboxed process."""
    try:
        _fork_sandboxed_process(control, channel, job)
    except (OSError, ValueError) as error:
        send_message(control, {"failed": f"{type(error).__name__}: {error}"}, JOB_LIMIT)
        os._exit(1)
    try:
        sys.path[:] = job["path"]
        send_message(control, {"ready": True}, JOB_LIMIT)
        receive_message(control, JOB_LIMIT)
        if job["role"] == "tests":
            send_message(control, tester.run(channel, job), JOB_LIMIT)
            os._exit(0)
        control.close()  # init keeps its own copy, which the program cannot reach
        if job["role"] == "script":
            script.run(channel, job["source"])
        program.serve(channel, job["source"], job["limit"])
    except Hangup:
        os._exit(1)
    os._exit(0)


def run_in_bubblewrap(control: int, channel: int) -> NoReturn:
    """Process 1 inside bubblewrap: a new interpreter, to which the job is sent a second time."""
    control_socket = socket.socket(fileno=control)
    run_init(control_socket, socket.socket(fileno=channel), receive_message(control_socket, JOB_LIMIT))


def _start_bubblewrap(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> NoReturn:
    """Runs bubblewrap and exits after it. Raises OSError if it does not start."""
    if os.geteuid() == 0:
        _become_nobody()
    complaint, complaint_writer = os.pipe()
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        os.dup2(complaint_writer, 2)
        for descriptor in (control.fileno(), channel.fileno()):
            os.set_inheritable(descriptor, True)
        os.execv(job["command"][0], [*job["command"], str(control.fileno()), str(channel.fileno())])
    channel.close()
    os.close(complaint_writer)
    status = os.waitpid(child, 0)[1]
    if status != 0:
        raise OSError(
            os.read(complaint, 2000).decode(errors="replace").strip()
            or f"bubblewrap ended with status {status}"
        )
    os._exit(0)


# namespaces -------------------------------------------------------------------------------------------------


def isolate(job: dict[str, Any]) -> None:
    """Creates namespaces and a root folder, according to the job's kind.

    root: mounts as root, then drops root, so that the kernel accounts the program to the user nobody. user:
    everything happens inside a new user namespace. bubblewrap and none: nothing is left to do here.
    """
    if job["kind"] == "root":
        kernel.unshare(kernel.ALL_BUT_USER)
        _make_root(job)
        _become_nobody()
        kernel.unshare(kernel.CLONE_NEWUSER)
    elif job["kind"] == "user":
        if os.geteuid() == 0:
            _become_nobody()
        user = os.geteuid()
        group = os.getegid()
        kernel.unshare(kernel.ALL_BUT_USER | kernel.CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _make_root(job)


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.allow_own_proc_files()


def _make_root(job: dict[str, Any]) -> None:
    """Builds a root folder of read-only system folders, five devices and an empty /tmp.

    It has no /proc, which would reveal too much.
    """
    os.umask(0o022)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    sources = {
        path: os.open(path, os.O_PATH) for path in [*job["readable"], *(f"/dev/{name}" for name in DEVICES)]
    }
    kernel.mount("root", _NEW_ROOT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path, source in sources.items():
        target = _NEW_ROOT + path
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        kernel.mount(f"/proc/self/fd/{source}", target, None, kernel.MS_BIND | kernel.MS_REC)
        kernel.make_read_only(target, devices=path.startswith("/dev/"))
        os.close(source)
    for path, target in job["links"].items():
        os.symlink(target, _NEW_ROOT + path)
    os.makedirs(f"{_NEW_ROOT}/tmp", exist_ok=True)
    size = f"size={job['file_bytes']},nr_inodes=1000,mode=1777"
    kernel.mount("tmp", f"{_NEW_ROOT}/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, size)
    kernel.become_root_folder(_NEW_ROOT)
    kernel.make_read_only("/", recursive=False)


# processes --------------------------------------------------------------------------------------------------


def _fork_sandboxed_process(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> None:
    """Forks the sandboxed process, in which it returns.

    The parent, init, watches the grader and the child, and ends with everything in its process namespace when
    either has ended.
    """
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    if job["kind"] != "none":
        kernel.drop_privileges()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(job["folder"])
        if job["role"] == "script":
            script.set_standard_input(job["stdin"])
        _set_limits(job)
        kernel.drop_privileges()
        kernel.filter_system_calls()
        return
    channel.close()
    kernel.forbid_inspection()
    ended_poll = select.poll()
    ended_poll.register(control, select.POLLRDHUP)
    ended_poll.register(os.pidfd_open(child), select.POLLIN)
    ended_poll.poll()
    if job["role"] == "script":
        _report_status(control, child)
    if job["kind"] == "none":
        _kill_group(child)
    os._exit(0)


def _report_status(control: socket.socket, child: int) -> None:
    """Reports to the grader how the child ended, unless the grader itself has ended."""
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        return
    try:
        send_message(control, {"status": os.waitstatus_to_exitcode(status)}, JOB_LIMIT)
    except Hangup:
        return


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
        os.waitpid(leader, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _set_limits(job: dict[str, Any]) -> None:
    """Sets soft and hard limits."""
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if job["kind"] != "none":  # without a user namespace it would count all processes of the user
        limits[resource.RLIMIT_NPROC] = job["processes"] - 1 + OWN_PROCESSES
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
