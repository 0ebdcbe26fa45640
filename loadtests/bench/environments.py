"""The interpreters that contenders run in: the service's own, or one made from a lock file."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from loadtests.bench.failure import BenchFailure

_LOCKS = Path("requirements")


def python_of(lock_name: str | None, work: Path) -> Path:
    """The interpreter of an environment in `work`, which is made when its lock file
    `requirements/<lock_name>.txt` is not what it was made from; None: the service's own.

    Raises `BenchFailure` when it cannot be made.
    """
    if lock_name is None:
        return Path(sys.executable)
    folder = (work / lock_name.removeprefix("bench-")).absolute()
    lock = _LOCKS / f"{lock_name}.txt"
    made_from = folder / "made-from"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if not made_from.exists() or made_from.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--quiet", "--python", sys.executable, str(folder))
        python = str(folder / "bin" / "python")
        _uv("pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", str(lock))
        made_from.write_text(digest)
    return folder / "bin" / "python"


def _uv(*arguments: str) -> None:
    beside_us = Path(sys.executable).with_name("uv")
    uv = str(beside_us) if beside_us.exists() else shutil.which("uv")
    if uv is None:
        raise BenchFailure("the peers' environments are made by uv, which `make bench` installs")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    try:
        subprocess.run([uv, *arguments], env=environment, check=True)
    except subprocess.CalledProcessError as exc:
        raise BenchFailure(f"uv {' '.join(arguments)} failed; it says why above") from exc
