"""Takes from the calling process what executing a model does not need: Linux, no privileges."""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION_3, _CAPABILITIES = 0x20080522, 64
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_OPEN_FILES = 64

# Numbers of the calls that open a network connection (also by io_uring), start a program, or reach
# into another process or signal it. The tables are asm/unistd_64.h and asm-generic/unistd.h.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED_CALLS = {
    "x86_64": (
        *(41, 59, 322, 425),  # socket, execve, execveat, io_uring_setup
        *(101, 310, 311, 438),  # ptrace, process_vm_readv, process_vm_writev, pidfd_getfd
        *(62, 200, 129, 297),  # kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
        *(434, 424, 251),  # pidfd_open, pidfd_send_signal, ioprio_set
    ),
    "aarch64": (
        *(198, 221, 281, 425),
        *(117, 270, 271, 438),
        *(129, 130, 138, 240),
        *(434, 424, 30),
    ),
}


class _Guard(NamedTuple):
    """A call that is refused, or with `only` is allowed, where an argument has one of the values.

    Only the lower half of the argument is compared: the kernel takes no more of these.
    """

    calls: dict[str, int]
    argument: int
    values: tuple[int, ...]
    only: bool


def _guards() -> tuple[_Guard, ...]:
    """Calls that a process needs for itself and must not use on others."""
    return (
        # tgkill: `abort` and faulthandler signal the process itself.
        _Guard({"x86_64": 234, "aarch64": 131}, 0, (os.getpid(),), only=True),
        _Guard({"x86_64": 302, "aarch64": 261}, 0, (0,), only=True),  # prlimit64
        _Guard({"x86_64": 141, "aarch64": 140}, 1, (0,), only=True),  # setpriority
        # The owner of a file gets a signal of choice when it can be read: fcntl F_SETOWN, F_SETSIG,
        # F_SETOWN_EX, and ioctl FIOSETOWN, SIOCSPGRP.
        _Guard({"x86_64": 72, "aarch64": 25}, 1, (8, 10, 15), only=False),
        _Guard({"x86_64": 16, "aarch64": 29}, 1, (0x8901, 0x8902), only=False),
    )


_X32 = 0x40000000


def confine(parent: int, *, memory_bytes: int) -> list[str]:
    """No network, no new programs, no hand on other processes, no capabilities, bounded memory,
    nothing written; killed when the parent ends.

    Call it while the process has one thread; there is no way back. Returns what the kernel did not
    grant, a sentence each. Raises `SystemExit` when the parent has ended already.
    """
    _limit(memory_bytes)
    if sys.platform != "linux":
        return [f"{sys.platform}: only Linux can keep a process from the network"]
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # when the machine runs out of memory, this one goes first
    gaps: list[str] = []
    namespace = _own_network(libc)
    # After the namespace: entering it makes the kernel forget the signal.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the server has ended")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    privileged = _drop_capabilities(libc)
    filtered = _refuse_calls(libc)
    if namespace is not None:
        what = (
            "may read and change its server through /proc where the user may, and has only the "
            "system call filter between itself and the network"
        )
        gaps.append(f"{what}: no namespaces of its own: {namespace}")
    if privileged is not None:
        gaps.append(f"has the server's capabilities: {privileged}")
    if filtered is not None:
        what = "may start programs and signal other processes"
        network = ", may reach the network" if namespace is not None else ""
        gaps.append(f"{what}{network}: no system call filter: {filtered}")
    return gaps


def _limit(memory_bytes: int) -> None:
    # The data segment, not the address space: libraries map much more than they use.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))


def _own_network(libc: ctypes.CDLL) -> str | None:
    """Why the process could not get a network namespace of its own, in which there is nothing."""
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def _drop_capabilities(libc: ctypes.CDLL) -> str | None:
    """Why the process could not give up all that its user may do beyond its own files."""
    for capability in range(_CAPABILITIES):
        # Refused where it has no right to: then it has nothing that it could lose either, and
        # PR_SET_NO_NEW_PRIVS, set before, keeps it so.
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.capset(header, bytes(24)) == 0:  # effective, permitted, inheritable, twice: all empty
        return None
    return os.strerror(ctypes.get_errno())


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _refuse_calls(libc: ctypes.CDLL) -> str | None:
    """Why the kernel did not take a filter under which those calls fail with EACCES."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return f"the calls of {machine} are not listed here"
    code = _filter(machine)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def _filter(machine: str) -> bytes:
    """A classic BPF program over `struct seccomp_data`: the call's number, its architecture and its
    arguments."""
    load, skip, equal, at_least, answer = 0x20, 0x05, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 13  # errno 13: EACCES

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    def guarded(guard: _Guard) -> bytes:
        count = len(guard.values)
        matched, other = (allow, refuse) if guard.only else (refuse, allow)
        return b"".join(
            (
                instruction(equal, guard.calls[machine], 0, count + 3),
                instruction(load, 16 + 8 * guard.argument),
                *(instruction(equal, value, count - at) for at, value in enumerate(guard.values)),
                instruction(answer, other),
                instruction(answer, matched),
            )
        )

    refused = _REFUSED_CALLS[machine]
    after = len(refused)
    return b"".join(
        (
            instruction(load, 4),
            # Calls of another kind have other numbers.
            instruction(equal, _ARCHITECTURES[machine], 0, after + 3),
            instruction(load, 0),
            instruction(at_least, _X32, after + 1),
            *(instruction(equal, call, after - at) for at, call in enumerate(refused)),
            instruction(skip, 1),
            instruction(answer, refuse),
            *map(guarded, _guards()),
            instruction(answer, allow),
        )
    )
