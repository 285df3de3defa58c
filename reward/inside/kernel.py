"""System calls that Python has no function for, and the filter that takes most of them away from a
program.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
ALL_BUT_USER = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18

_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_RDONLY, _NOSUID, _NODEV = 1, 2, 4
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION = 0x20080522
_ANY_NAMESPACE = ALL_BUT_USER | CLONE_NEWUSER | CLONE_NEWTIME

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
# name: (x86_64, aarch64). What a program under test has no use for: other processes, mounts, namespaces,
# memory outside its limits, the corners of the kernel where privilege errors are found, and what marks or
# watches a file that another sandbox sees as well.
_NUMBERS = {
    **{
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "pidfd_getfd": (438, 438),
    },
    **{
        "kcmp": (312, 272),
        "unshare": (272, 97),
        "setns": (308, 268),
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
    },
    **{
        "chroot": (161, 51),
        "open_tree": (428, 428),
        "move_mount": (429, 429),
        "fsopen": (430, 430),
        "fsconfig": (431, 431),
    },
    **{
        "fsmount": (432, 432),
        "fspick": (433, 433),
        "mount_setattr": (442, 442),
        "keyctl": (250, 219),
        "add_key": (248, 217),
    },
    **{
        "request_key": (249, 218),
        "bpf": (321, 280),
        "perf_event_open": (298, 241),
        "userfaultfd": (323, 282),
    },
    **{
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "memfd_create": (319, 279),
    },
    **{
        "memfd_secret": (447, 447),
        "shmget": (29, 194),
        "msgget": (68, 186),
        "semget": (64, 190),
        "name_to_handle_at": (303, 264),
    },
    **{
        "open_by_handle_at": (304, 265),
        "flock": (73, 32),
        "inotify_add_watch": (254, 27),
        "fanotify_init": (300, 262),
    },
    **{"mincore": (27, 232), "cachestat": (451, 451), "syslog": (103, 116)},
}
_CLONE, _CLONE3, _SOCKET, _PRLIMIT, _FCNTL = (56, 220), (435, 435), (41, 198), (302, 261), (72, 25)
# What fcntl does to a descriptor alone: duplicates, close-on-exec and status flags, a pipe's size. The rest
# are locks, leases, notifications and hints, which belong to the file: a program that holds a library's may
# be seen by all others.
_OWN_FCNTL = (*range(5), 1030, 1032)
_EPERM, _ENOSYS, _ENOLCK, _EAFNOSUPPORT, _AF_UNIX = 1, 38, 37, 97, 1
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_AT_NUMBER, _AT_ARCH, _AT_FIRST, _AT_SECOND = (
    0,
    4,
    16,
    24,
)  # offsets in seccomp_data; both machines are little-endian

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    given = [text.encode() if text is not None else None for text in (source, target, kind)]
    _checked(
        f"mount {target}",
        _libc.mount(
            *map(ctypes.c_char_p, given),
            ctypes.c_ulong(flags),
            ctypes.c_char_p(options.encode() if options else None),
        ),
    )


def make_read_only(target: str, *, devices: bool = False, below: bool = True) -> None:
    """The mount at ``target``, and those below it, without a way to write, to gain privilege or
    (unless ``devices``) to reach a device.
    """
    attributes = struct.pack("QQQQ", _RDONLY | _NOSUID | (0 if devices else _NODEV), 0, 0, 0)
    flags = _AT_RECURSIVE if below else 0
    _checked(
        f"mount_setattr {target}",
        _syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, attributes, len(attributes)),
    )


def become_root_folder(folder: str) -> None:
    """``folder``, which is a mount, becomes ``/``; what was there is gone."""
    os.chdir(folder)
    _checked("pivot_root", _syscall(_number_of("pivot_root"), b".", b"."))
    _checked("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def die_with_parent(signal: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal)


def adopt_orphans() -> None:
    """Descendants whose parent has ended become children of this process, whatever session they are in."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def allow_own_proc_files() -> None:
    """After a change of user, what /proc says of this process belongs to root until then."""
    _prctl(_PR_SET_DUMPABLE, 1)


def forbid_inspection() -> None:
    """Nobody of the same user may trace this process or take its descriptors."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_privileges() -> None:
    """No capabilities, none to be gained by executing anything."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), None, None, None) != 0:
            break  # past the last one, or none may be dropped since none is held
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _checked("capset", _libc.capset(header, bytes(24)))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_system_calls() -> None:
    """Refuses what a program under test has no use for, networks included. On other machines than x86-64 and
    arm64 it does nothing: namespaces and limits hold without it."""
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        return
    filters = _filters(machine)
    code = ctypes.create_string_buffer(b"".join(filters), 8 * len(filters))
    program = struct.pack("HxxxxxxP", len(filters), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program, len(program)))


def _filters(machine: str) -> list[bytes]:
    """Classic BPF over (number, architecture, arguments) of a call."""
    column = list(_AUDIT_ARCH).index(machine)
    refuse, allow = _step(_RETURN, _ERRNO | _EPERM), _step(_RETURN, _ALLOW)
    filters = [
        _step(_LOAD, _AT_ARCH),
        _step(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _AT_NUMBER),
    ]
    filters += [_step(_JUMP_AT_LEAST, _X32, 0, 1), refuse] if machine == "x86_64" else []
    for numbers in _NUMBERS.values():
        filters += [_step(_JUMP_EQUAL, numbers[column], 0, 1), refuse]
    filters += [
        _step(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        _step(_RETURN, _ERRNO | _ENOSYS),
    ]  # its flags are out of a filter's sight
    first = _step(_LOAD, _AT_FIRST)
    filters += [
        _step(_JUMP_EQUAL, _CLONE[column], 0, 4),
        first,
        _step(_JUMP_ANY_BIT, _ANY_NAMESPACE, 0, 1),
        refuse,
        allow,
    ]
    filters += [
        _step(_JUMP_EQUAL, _PRLIMIT[column], 0, 4),
        first,
        _step(_JUMP_EQUAL, 0, 1, 0),
        refuse,
        allow,
    ]  # its own limits only
    filters += [
        _step(_JUMP_EQUAL, _SOCKET[column], 0, 4),
        first,
        _step(_JUMP_EQUAL, 1, 1, 0),
        _step(_RETURN, _ERRNO | _EAFNOSUPPORT),
        allow,
    ]
    filters += [_step(_JUMP_EQUAL, _FCNTL[column], 0, len(_OWN_FCNTL) + 2), _step(_LOAD, _AT_SECOND)]
    filters += [
        _step(_JUMP_EQUAL, command, len(_OWN_FCNTL) - place) for place, command in enumerate(_OWN_FCNTL)
    ]
    return [*filters, _step(_RETURN, _ERRNO | _ENOLCK), allow]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _prctl(option: int, value: int, pointer: Any = None) -> None:
    _checked(f"prctl {option}", _libc.prctl(option, ctypes.c_ulong(value), pointer, None, None))


def _syscall(number: int, *arguments: int | bytes) -> int:
    as_c = [
        ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments
    ]
    return _libc.syscall(ctypes.c_long(number), *as_c)


def _number_of(name: str) -> int:
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        raise OSError(_ENOSYS, f"{name}: its number on {machine} is not known; install bubblewrap")
    return _NUMBERS[name][list(_AUDIT_ARCH).index(machine)]
