"""Takes from the calling process what executing a model does not need: Linux, no privileges."""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_OPEN_FILES = 64

# Numbers of the calls that open a network connection (also by io_uring), start a program or reach
# into another process. The tables are asm/unistd_64.h and asm-generic/unistd.h.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED_CALLS = {
    #          socket  ptrace  execve  execveat  vm_readv  vm_writev  io_uring_setup
    "x86_64": (41, 101, 59, 322, 310, 311, 425),
    "aarch64": (198, 117, 221, 281, 270, 271, 425),
}
_X32 = 0x40000000


def confine(parent: int, *, memory_bytes: int, nice: int) -> list[str]:
    """No network, no new programs, bounded memory, nothing written; killed when the parent ends.

    Call it while the process has one thread; there is no way back. Returns what the kernel did not
    grant, a sentence each. Raises `SystemExit` when the parent has ended already.
    """
    _limit(memory_bytes)
    os.nice(nice)
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
    filtered = _refuse_calls(libc)
    if filtered is not None:
        gaps.append(f"may start programs: no system call filter: {filtered}")
    if namespace is not None and filtered is not None:
        gaps.append(f"may reach the network: no namespace of its own: {namespace}")
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


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _refuse_calls(libc: ctypes.CDLL) -> str | None:
    """Why the kernel did not take a filter under which those calls fail with EACCES."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return f"the calls of {machine} are not listed here"
    code = _filter(_ARCHITECTURES[machine], _REFUSED_CALLS[machine])
    instructions = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def _filter(architecture: int, refused: tuple[int, ...]) -> bytes:
    """A classic BPF program over `struct seccomp_data`: the call's number and its architecture."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 13  # errno 13: EACCES

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    after = len(refused)
    return b"".join(
        (
            instruction(load, 4),
            instruction(equal, architecture, 0, after + 3),  # calls of another kind have others
            instruction(load, 0),
            instruction(at_least, _X32, after + 1),
            *(instruction(equal, call, after - at) for at, call in enumerate(refused)),
            instruction(answer, allow),
            instruction(answer, refuse),
        )
    )
