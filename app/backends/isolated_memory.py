"""What the calling process holds in memory, so that what a model takes can be told apart."""

import contextlib
import ctypes
import gc
from pathlib import Path


def settled_memory() -> int:
    """Give back what is not used and begin to note the peak (`VmHWM`) anew; the bytes of memory
    that are still held, 0 where the system does not say."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed, and other libraries do not
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)
