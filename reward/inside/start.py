"""Shuts processes in, before they run anything that was not written here.

nursery (imports once, then forks) -> launcher (new namespaces, a root folder of its own) -> init (process 1:
when it ends, all end) -> inmate (limits, no privileges). A control socket carries the job in, "ready" and
"go" across, a tester's verdict out. When the grader closes it, init ends; when everything has ended, the
launcher closes its own end.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from reward.inside import kernel, program, script, tester
from reward.inside.names import DEVICES, NOBODY
from reward.inside.wire import Hangup, receive, send

JOB_LIMIT = 1 << 26  # bytes
OWN_PROCESSES = 3  # launcher, init and inmate, which count as the program's user

_BUILD_AT = "/tmp"  # any folder that exists: only this process sees what is mounted there


def nursery(descriptor: int) -> NoReturn:
    """Forks a launcher for every pair (control, channel) of descriptors that arrives, until the
    grader hangs up.
    """
    orders = socket.socket(fileno=descriptor)
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (most, most)
    )  # the grader's own is for one completion, this process serves them all
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    while True:
        word, descriptors, _, _ = socket.recv_fds(orders, 1, 2)
        if not word:
            os._exit(0)
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kernel.die_with_parent(signal.SIGKILL)
            launch(socket.socket(fileno=descriptors[0]), socket.socket(fileno=descriptors[1]))
        for one in descriptors:
            os.close(one)


def launch(control: socket.socket, channel: socket.socket) -> NoReturn:
    try:
        job = receive(control, JOB_LIMIT)
        if job["kind"] == "bubblewrap":
            _wrap(control, channel, job)
        shut_in(job)
        kernel.die_with_parent(signal.SIGKILL)  # a change of user has cancelled it
        child = os.fork()
        if child == 0:
            kernel.die_with_parent(signal.SIGKILL)
            inside(control, channel, job)
        channel.close()
        os.waitpid(child, 0)
    except (OSError, ValueError) as error:
        send(control, {"failed": f"{type(error).__name__}: {error}"}, JOB_LIMIT)
    except Hangup:
        os._exit(1)
    os._exit(0)


def inside(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> NoReturn:
    """Init, and its child the inmate."""
    try:
        _become_inmate(control, channel, job)
    except (OSError, ValueError) as error:
        send(control, {"failed": f"{type(error).__name__}: {error}"}, JOB_LIMIT)
        os._exit(1)
    try:
        sys.path[:] = job["path"]
        send(control, {"ready": True}, JOB_LIMIT)
        receive(control, JOB_LIMIT)
        if job["role"] == "tests":
            send(control, tester.run(channel, job), JOB_LIMIT)
            os._exit(0)
        control.close()  # init keeps its own, which the program cannot reach
        if job["role"] == "script":
            script.run(channel, job["source"])
        program.serve(channel, job["source"], job["limit"])
    except Hangup:
        os._exit(1)
    os._exit(0)


def wrapped(control: int, channel: int) -> NoReturn:
    """Process 1 of a bubblewrap: a new interpreter, to which the job is sent once more."""
    ours = socket.socket(fileno=control)
    inside(ours, socket.socket(fileno=channel), receive(ours, JOB_LIMIT))


def _wrap(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> NoReturn:
    """Bubblewrap in this process's stead. Raises OSError where there is none."""
    if os.geteuid() == 0:
        _become_nobody()
    complaint, said = os.pipe()
    child = os.fork()
    if child == 0:
        kernel.die_with_parent(signal.SIGKILL)
        os.dup2(said, 2)
        for one in (control.fileno(), channel.fileno()):
            os.set_inheritable(one, True)
        os.execv(job["command"][0], [*job["command"], str(control.fileno()), str(channel.fileno())])
    channel.close()
    os.close(said)
    status = os.waitpid(child, 0)[1]
    if status != 0:
        raise OSError(
            os.read(complaint, 2000).decode(errors="replace").strip()
            or f"bubblewrap ended with status {status}"
        )
    os._exit(0)


# namespaces -------------------------------------------------------------------------------------------------


def shut_in(job: dict[str, Any]) -> None:
    """Namespaces and a root folder, by the job's kind.

    root: mounts as root, then gives it up, so that a program is nobody even to the kernel's accounts. user:
    all inside a new user namespace. bubblewrap and none: nothing is left, or nothing is wanted, to do here.
    """
    if job["kind"] == "root":
        kernel.unshare(kernel.ALL_BUT_USER)
        _make_root(job)
        _become_nobody()
        kernel.unshare(kernel.CLONE_NEWUSER)
    elif job["kind"] == "user":
        if os.geteuid() == 0:
            _become_nobody()
        user, group = os.geteuid(), os.getegid()
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
    """A root folder of read-only system folders, five devices and an empty /tmp.

    No /proc: it would show more than it is worth.
    """
    os.umask(0o022)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    sources = {
        path: os.open(path, os.O_PATH) for path in [*job["readable"], *(f"/dev/{name}" for name in DEVICES)]
    }
    kernel.mount("root", _BUILD_AT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path, source in sources.items():
        target = _BUILD_AT + path
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        kernel.mount(f"/proc/self/fd/{source}", target, None, kernel.MS_BIND | kernel.MS_REC)
        kernel.make_read_only(target, devices=path.startswith("/dev/"))
        os.close(source)
    for path, target in job["links"].items():
        os.symlink(target, _BUILD_AT + path)
    os.makedirs(f"{_BUILD_AT}/tmp", exist_ok=True)
    size = f"size={job['file_bytes']},nr_inodes=1000,mode=1777"
    kernel.mount("tmp", f"{_BUILD_AT}/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, size)
    kernel.become_root_folder(_BUILD_AT)
    kernel.make_read_only("/", below=False)


# processes --------------------------------------------------------------------------------------------------


def _become_inmate(control: socket.socket, channel: socket.socket, job: dict[str, Any]) -> None:
    """Init watches the grader and its child, and ends, with everything in its process namespace, when
    either has gone.
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
            script.take_input(job["stdin"])
        _limit(job)
        kernel.drop_privileges()
        kernel.filter_system_calls()
        return
    channel.close()
    kernel.forbid_inspection()
    gone = select.poll()
    gone.register(control, select.POLLRDHUP)
    gone.register(os.pidfd_open(child), select.POLLIN)
    gone.poll()
    if job["role"] == "script":
        _report(control, child)
    if job["kind"] == "none":
        _kill_group(child)
    os._exit(0)


def _report(control: socket.socket, child: int) -> None:
    """How the child ended, to the grader, unless it is the grader that has gone."""
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        return
    try:
        send(control, {"status": os.waitstatus_to_exitcode(status)}, JOB_LIMIT)
    except Hangup:
        return


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
        os.waitpid(leader, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _limit(job: dict[str, Any]) -> None:
    """Soft and hard alike."""
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if job["kind"] != "none":  # without a user namespace it would count all that the user runs
        limits[resource.RLIMIT_NPROC] = job["processes"] - 1 + OWN_PROCESSES
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
