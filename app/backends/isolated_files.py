"""Takes from the calling process all files but a model's own and those of Python: Landlock."""

import ctypes
import glob
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import app

# The numbers are the same on every architecture (asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
# What the kernel's versions 1, 2 and 3 know: to execute, read, write, remove, make, move, truncate.
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}

# Libraries, what a runtime asks of the machine, and GPUs.
_OF_THE_MACHINE = (
    *("/lib", "/lib64", "/usr", "/opt", "/etc/ld.so.cache", "/sys"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/driver"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/nvidia*")


def only_read(folder: Path) -> str | None:
    """From here on the process can open the files of that folder, of Python and its libraries and
    what the machine says of itself, and no other one. Why the kernel did not take that; None where
    it did.

    Call it while the process has one thread, after `PR_SET_NO_NEW_PRIVS`; there is no way back.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no Landlock"
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    handled = struct.pack("=Q", _HANDLED[min(version, max(_HANDLED))])
    rules = libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    try:
        for path, access in _allowed(folder):
            _allow(libc, rules, path, access)
        if libc.syscall(_RESTRICT_SELF, rules, 0) < 0:
            return f"no Landlock: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(rules)
    return None


def _allowed(folder: Path) -> Iterator[tuple[str, int]]:
    ours = Path(app.__file__).parent
    yield str(folder), _READ
    yield str(ours), _READ
    yield str(ours.parent), _READ_DIR  # Python looks there for what it imports
    for path in {*sys.path, sys.prefix, sys.base_prefix} - {"", str(ours.parent)}:
        yield path, _READ
    for path in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        yield path, _READ
    for path in _OF_THE_MACHINE:
        yield path, _READ
    yield "/proc/self", _READ | _WRITE_FILE
    for pattern in _DEVICES:
        for path in glob.glob(pattern):
            yield path, _READ_FILE | _WRITE_FILE


def _allow(libc: ctypes.CDLL, rules: int, path: str, access: int) -> None:
    """Nothing where there is no such path."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= ~_READ_DIR
        libc.syscall(_ADD_RULE, rules, _BENEATH, struct.pack("=Qi", access, handle), 0)
    finally:
        os.close(handle)
