"""What processes of this machine hold (Linux)."""

from contextlib import suppress
from pathlib import Path


def resident_mb(process: int | str) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def proportional_mb(process: int) -> float:
    """Resident memory of a process, of pages that others have, too, its share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
    return int(kib) * 1024 / 1e6


def workers_of(parent: int) -> list[int]:
    """The workers of a `hikyaku serve` that answers, in the order in which they were started."""
    return [int(n) for n in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def isolated_of(worker: int) -> dict[int, float]:
    """The processes that a worker has started, which are all isolated ones, and that live, with the
    resident memory of each in MB.

    Their command lines are not looked at: who reads one waits for its process, which may be idle.
    """
    found = {}
    for process in workers_of(worker):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
            found[process] = resident_mb(process)
    return {process: size for process, size in found.items() if size}


def worker_of(parent: int) -> int:
    """The only one of them."""
    (worker,) = workers_of(parent)
    return worker
