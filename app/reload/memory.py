"""What memory there is for another model, and how what was freed is given back."""

import ctypes
from pathlib import Path

from app.errors import InvalidModel

_CGROUPS = Path("/sys/fs/cgroup")


def require_room(needed_bytes: int, what: str) -> None:
    """Raises `InvalidModel` where `what` would need more memory than there is: better no new
    version than no service."""
    free = free_bytes()
    if free is not None and needed_bytes > free:
        raise InvalidModel(
            f"{what} would take {needed_bytes >> 20:,} MB and {free >> 20:,} MB are free: unload a "
            "version that does not serve, or give the service more memory"
        )


def free_bytes() -> int | None:
    """What may still be used, of the machine and of our control group; None where neither says."""
    found = [free for free in (_free_of_machine(), _free_of_group()) if free is not None]
    return min(found, default=None)


def give_back() -> None:
    """Return to the kernel what the C library keeps of what was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    table = dict(line.split(":", 1) for line in lines)
    return int(table["MemAvailable"].split()[0]) << 10 if "MemAvailable" in table else None


def _free_of_group() -> int | None:
    """By the limit of our group or of one above it, whichever leaves least; its file cache can be
    given up."""
    try:
        (path,) = (
            line.removeprefix("0::/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::/")
        )
    except (OSError, ValueError):
        return None
    group = _CGROUPS / path
    free = [
        found
        for folder in (group, *group.parents)
        if folder.is_relative_to(_CGROUPS) and (found := _free_in(folder)) is not None
    ]
    return min(free, default=None)


def _free_in(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
