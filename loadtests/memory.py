"""What processes of this machine hold (Linux)."""

from pathlib import Path


def resident_mb(process: int | str) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def worker_of(parent: int) -> int:
    """The worker of a `hikyaku serve` that answers."""
    (worker,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(worker)
