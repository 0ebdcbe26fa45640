"""What a server and its children have used, read from /proc."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Stat:
    pid: int
    parent: int
    session: int
    cpu_ticks: int
    started_ticks: int


@dataclass(frozen=True)
class Member:
    """A process for good: numbers are given again, a number and its start are not."""

    pid: int
    started_ticks: int


class ProcessTree:
    """The process `root`, which leads a session of its own, and whatever descends from it."""

    def __init__(self, root: int) -> None:
        self._root = root

    def members(self) -> set[Member]:
        """Those alive now: the root's session, and descendants that left it."""
        return {Member(stat.pid, stat.started_ticks) for stat in self._stats()}

    def cpu_s(self) -> float:
        """Seconds of processor, user and system, since the start; of children that ended, too."""
        return sum(stat.cpu_ticks for stat in self._stats()) / _TICKS_S

    def resident_mib(self) -> float:
        """Resident memory, summed: what two of them share counts twice."""
        return sum(_resident_kib(stat.pid) for stat in self._stats()) / 1024

    def signal(self, number: signal.Signals) -> None:
        """Send it to all of them."""
        for stat in self._stats():
            with contextlib.suppress(ProcessLookupError):
                os.kill(stat.pid, number)

    def kill(self, family: set[Member]) -> None:
        """End at once who is left of `family`, earlier members, and of those alive now."""
        for member in family | self.members():
            stat = _stat(member.pid)
            if stat is not None and stat.started_ticks == member.started_ticks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)

    def _stats(self) -> list[_Stat]:
        everyone = [
            stat
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None
        ]
        family = {stat.pid for stat in everyone if self._root in (stat.pid, stat.session)}
        while True:
            born = {stat.pid for stat in everyone if stat.parent in family} - family
            if not born:
                return [stat for stat in everyone if stat.pid in family]
            family |= born


def _stat(pid: int) -> _Stat | None:
    """None when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    # proc(5): ppid is the 4th field, session the 6th, utime, stime, cutime and cstime the 14th to
    # 17th, starttime the 22nd.
    cpu_ticks = sum(map(int, fields[11:15]))
    return _Stat(pid, int(fields[1]), int(fields[3]), cpu_ticks, int(fields[19]))


def _resident_kib(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # What has ended and is not yet waited for has no memory, and no line about it.
    return next((int(x.split()[1]) for x in text.splitlines() if x.startswith("VmRSS:")), 0)
