"""What a training or a publication was made from: code, data, seeds, machine, versions."""

import getpass
import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from app.contract import Contract, load_contract
from app.features import encoding
from app.repository.layout import CONTRACT_FILE
from app.repository.manifest import Environment, Lock, Run, Source, describe

# They decide how many threads compute, and with it perhaps the last bits of sums.
THREAD_VARIABLES = (
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
)
_PINNED = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?==(?P<version>[^\s;\\]+)")


class RunRecord:
    """Describes this process as the training of the model in `model_dir`, for its training.json.

    Make it before the training reads anything: it notes the code, and the files `data`, each of
    which it reads in pieces. `lock` is the file that the packages were installed from; it is named
    only where they are those that it pins.
    """

    def __init__(
        self,
        model_dir: Path,
        feature_repo: Path,
        *,
        data: Iterable[Path],
        seeds: Mapping[str, int],
        lock: Path | None = None,
    ) -> None:
        code = training_code(load_contract(model_dir / CONTRACT_FILE), model_dir, feature_repo)
        self._source = source_of(model_dir)
        self._code = {name: describe(path) for name, path in code.items()}
        self._data = {relative_name(path, model_dir): describe(path) for path in data}
        self._seeds = dict(seeds)
        self._lock = lock

    def finished(self) -> Run:
        """To be asked once the training is over: the packages are those imported by then."""
        return Run(
            command=["python", *sys.orig_argv[1:]],
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            source=self._source,
            code=self._code,
            data=self._data,
            seeds=self._seeds,
            environment=environment(lock=self._lock),
        )


def training_code(contract: Contract, code: Path | None, feature_repo: Path) -> dict[str, Path]:
    """The files whose change makes another training, by name, in order: those of the folder `code`
    of the model's own, what encodes rows, and the feature repository where the model reads one."""
    files = {"app/features/encoding.py": Path(encoding.__file__)}
    if code is not None:
        files |= {f"{code.absolute().name}/{path.name}": path for path in code.glob("*.py")}
    if contract.feature_service is not None:
        read = [*feature_repo.glob("*.py"), feature_repo / "feature_store.yaml"]
        files |= {f"{feature_repo.absolute().name}/{path.name}": path for path in read}
    return dict(sorted(files.items()))


def relative_name(path: Path, model_dir: Path) -> str:
    """As model.yaml would name the file: relative to the model's folder."""
    return Path(os.path.relpath(path.resolve(), model_dir.resolve())).as_posix()


def source_of(folder: Path) -> Source:
    """The checkout that a folder is in; empty outside of one."""
    described = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    commit = described.decode().strip()
    if not commit.endswith("-dirty"):
        return Source(commit=commit)
    # The plumbing, because a user's settings change what `git diff` prints.
    difference = _git(folder, "diff-index", "-p", "--binary", "--full-index", "HEAD")
    return Source(commit=commit, diff_sha256=hashlib.sha256(difference).hexdigest())


def environment(*, also: Iterable[str] = (), lock: Path | None = None) -> Environment:
    """Of this process: the distributions that it has imported, and those of `also` that are
    installed."""
    packages = _imported()
    for name in also:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages = dict(sorted(packages.items()))
    return Environment(
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        platform=platform.platform(),
        machine=platform.machine(),
        processor=_processor(),
        cpus=_cpus(),
        variables={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        packages=packages,
        lock=None if lock is None else _lock(lock, packages),
    )


def publisher() -> str:
    """Who runs this process, as user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _imported() -> dict[str, str]:
    """The version of every distribution that has a module in this process."""
    roots = {name.partition(".")[0] for name in sys.modules}
    of_module = _installed()
    names = {name for root in roots for name in of_module.get(root, ())}
    return {_normal(name): importlib.metadata.version(name) for name in names}


@cache
def _installed() -> Mapping[str, Sequence[str]]:
    """The distributions of every top-level module: it takes a quarter of a second to ask."""
    return importlib.metadata.packages_distributions()


def _lock(path: Path, packages: Mapping[str, str]) -> Lock | None:
    """None where a package is not of the version that the file pins: it was not installed so."""
    if not path.is_file():
        return None
    pinned: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        pin = _PINNED.match(line)
        if pin is not None:
            pinned.setdefault(_normal(pin["name"]), set()).add(pin["version"])
    if any(name in pinned and version not in pinned[name] for name, version in packages.items()):
        return None
    return Lock(file=path.name, sha256=describe(path).sha256)


def _normal(name: str) -> str:
    """One spelling of a distribution's name, that of the packaging specifications."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def _cpus() -> int:
    """How many this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(folder: Path, *arguments: str) -> bytes:
    """What git prints; nothing where there is no git, or no checkout."""
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
