"""Whether what a publisher renames into sight is on the disk by then, from a trace of its calls."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from json import dumps
from pathlib import Path, PurePosixPath

from loadtests.forked_publishers import Publication

_CALLS = "openat,write,pwrite64,writev,fsync,fdatasync,?rename,?mkdir"
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?")
_OPEN_FILE = re.compile(r"^\d+<(/[^>]*)>")
_TEXT = re.compile(r'"([^"]*)"')


def trace(publication: Publication, log: Path) -> list[str]:
    """The calls of one publisher that change files below the model's folder, in order."""
    program = (
        "import json, sys; from loadtests.forked_publishers import Publication, publish_one; "
        "publish_one(Publication(**json.loads(sys.argv[1])))"
    )
    strace = ["strace", "-f", "-y", "-qq", "-s", "4096", "-o", str(log), "-e", f"trace={_CALLS}"]
    command = [*strace, sys.executable, "-c", program, dumps(asdict(publication))]
    subprocess.run(command, check=True)
    return [line for line in log.read_text().splitlines() if publication.model in line]


def lost_by_a_power_cut(calls: Iterable[str]) -> Iterator[str]:
    """What is not on the disk, neither as content nor as a name, when a rename shows it, and what
    is not when all is done."""
    unsynced: set[str] = set()
    renamed_into: set[str] = set()
    for call in calls:
        match = _CALL.match(call)
        if match is None or int(match[3]) < 0:
            continue
        name, arguments, opened = match[1], match[2], match[4]
        files, paths = set(_OPEN_FILE.findall(arguments)), _TEXT.findall(arguments)
        if name == "openat" and "O_CREAT" in arguments:
            unsynced |= {opened, _above(opened)}
        elif name in {"write", "pwrite64", "writev"}:
            unsynced |= files
        elif name in {"fsync", "fdatasync"}:
            unsynced -= files
            renamed_into -= files
        elif name == "mkdir":
            unsynced |= {paths[0], _above(paths[0])}
        elif name == "rename":
            old, new = paths
            shown = {path for path in unsynced if f"{path}/".startswith(f"{old}/")}
            # What was renamed before this must not come to light after it.
            shown |= renamed_into & {_above(new)}
            yield from (f"{path} is not synced when {new} appears" for path in sorted(shown))
            unsynced = (unsynced - shown) | {_above(new)}
            renamed_into.add(_above(new))
    yield from (f"{path} is not synced in the end" for path in sorted(unsynced))


def _above(path: str) -> str:
    return str(PurePosixPath(path).parent)
