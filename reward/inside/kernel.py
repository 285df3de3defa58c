"""System calls for which Python has no function, and a filter that denies dangerous calls to a program."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x80
ALL_BUT_USER = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_AT_FDCWD = -100
_RDONLY = 1
_NOSUID = 2
_NODEV = 4
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION = 0x20080522
_ANY_NAMESPACE = ALL_BUT_USER | CLONE_NEWUSER | CLONE_NEWTIME

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
# name: (x86_64, aarch64). Calls that a program under test does not need: they concern other processes,
# mounts, namespaces, memory outside its limits and parts of the kernel with a history of privilege errors, or
# mark or watch files that other sandboxes see too.
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
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_SOCKET = (41, 198)
_PRLIMIT = (302, 261)
_FCNTL = (72, 25)
# Commands of fcntl that affect only a descriptor: duplicates, close-on-exec and status flags, a pipe's size.
# The others are locks, leases, notifications and hints, which belong to the file: if a program held one on a
# library's file, all other programs would see it.
_ALLOWED_FCNTL = (*range(5), 1030, 1032)
_EPERM = 1
_ENOSYS = 38
_ENOLCK = 37
_EAFNOSUPPORT = 97
_AF_UNIX = 1
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL = 0x80000000
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06
# Offsets in seccomp_data; both machines are little-endian.
_AT_NUMBER = 0
_AT_ARCH = 4
_AT_FIRST = 16
_AT_SECOND = 24

_libc = ctypes.CDLL(None, use_errno=True)


def _check_result(call: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check_result("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded_texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    _check_result(
        f"mount {target}",
        _libc.mount(
            *map(ctypes.c_char_p, encoded_texts),
            ctypes.c_ulong(flags),
            ctypes.c_char_p(options.encode() if options else None),
        ),
    )


def make_read_only(target: str, *, devices: bool = False, recursive: bool = True) -> None:
    """Forbids writing, gaining privileges and (unless ``devices``) access to devices in the mount at
    ``target`` and, if ``recursive``, in the mounts below it.
    """
    attributes = struct.pack("QQQQ", _RDONLY | _NOSUID | (0 if devices else _NODEV), 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _check_result(
        f"mount_setattr {target}",
        _syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, attributes, len(attributes)),
    )


def become_root_folder(folder: str) -> None:
    """Makes ``folder``, which is a mount, the root folder, and unmounts the old root."""
    os.chdir(folder)
    _check_result("pivot_root", _syscall(_system_call_number("pivot_root"), b".", b"."))
    _check_result("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def die_with_parent(signal: int | None) -> None:
    """None: no longer."""
    _prctl(_PR_SET_PDEATHSIG, signal or 0)


def adopt_orphans() -> None:
    """Makes descendants whose parent has ended children of this process, whatever session they are in."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def allow_own_proc_files() -> None:
    """Gives this process's files in /proc back to its user; after a change of user they belong to root."""
    _prctl(_PR_SET_DUMPABLE, 1)


def forbid_inspection() -> None:
    """Forbids other processes of the same user to trace this process or take its descriptors."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_privileges() -> None:
    """Drops all capabilities, and forbids gaining any by executing a file."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), None, None, None) != 0:
            break  # past the last capability, or none may be dropped because none is held
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _check_result("capset", _libc.capset(header, bytes(24)))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def filter_system_calls() -> None:
    """Denies the system calls that a program under test does not need, network calls included.

    On machines other than x86-64 and arm64 it does nothing; namespaces and limits still apply there.
    """
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        return
    instructions = _filter_program(machine)
    code = ctypes.create_string_buffer(b"".join(instructions), 8 * len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(program, len(program)))


def _filter_program(machine: str) -> list[bytes]:
    """A classic BPF program over the number, architecture and arguments of a call."""
    column = list(_AUDIT_ARCH).index(machine)
    refuse = _instruction(_RETURN, _ERRNO | _EPERM)
    allow = _instruction(_RETURN, _ALLOW)
    instructions = [
        _instruction(_LOAD, _AT_ARCH),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _AT_NUMBER),
    ]
    instructions += [_instruction(_JUMP_AT_LEAST, _X32, 0, 1), refuse] if machine == "x86_64" else []
    for numbers in _NUMBERS.values():
        instructions += [_instruction(_JUMP_EQUAL, numbers[column], 0, 1), refuse]
    # The filter cannot see the flags of clone3.
    instructions += [
        _instruction(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        _instruction(_RETURN, _ERRNO | _ENOSYS),
    ]
    load_first = _instruction(_LOAD, _AT_FIRST)
    instructions += [
        _instruction(_JUMP_EQUAL, _CLONE[column], 0, 4),
        load_first,
        _instruction(_JUMP_ANY_BIT, _ANY_NAMESPACE, 0, 1),
        refuse,
        allow,
    ]
    # A process may change only its own limits.
    instructions += [
        _instruction(_JUMP_EQUAL, _PRLIMIT[column], 0, 4),
        load_first,
        _instruction(_JUMP_EQUAL, 0, 1, 0),
        refuse,
        allow,
    ]
    instructions += [
        _instruction(_JUMP_EQUAL, _SOCKET[column], 0, 4),
        load_first,
        _instruction(_JUMP_EQUAL, 1, 1, 0),
        _instruction(_RETURN, _ERRNO | _EAFNOSUPPORT),
        allow,
    ]
    instructions += [
        _instruction(_JUMP_EQUAL, _FCNTL[column], 0, len(_ALLOWED_FCNTL) + 2),
        _instruction(_LOAD, _AT_SECOND),
    ]
    instructions += [
        _instruction(_JUMP_EQUAL, command, len(_ALLOWED_FCNTL) - index)
        for index, command in enumerate(_ALLOWED_FCNTL)
    ]
    return [*instructions, _instruction(_RETURN, _ERRNO | _ENOLCK), allow]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _prctl(option: int, value: int, pointer: Any = None) -> None:
    _check_result(f"prctl {option}", _libc.prctl(option, ctypes.c_ulong(value), pointer, None, None))


def _syscall(number: int, *arguments: int | bytes) -> int:
    c_arguments = [
        ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments
    ]
    return _libc.syscall(ctypes.c_long(number), *c_arguments)


def _system_call_number(name: str) -> int:
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        raise OSError(_ENOSYS, f"{name}: its number on {machine} is unknown; install bubblewrap")
    return _NUMBERS[name][list(_AUDIT_ARCH).index(machine)]
