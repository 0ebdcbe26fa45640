"""Kills publishers before each of their writes, and damages whatever a version is made of.

    python -m loadtests.prove_repository --runs 1000 --damaged 20000 --seed 1

1. In a folder: a publisher is killed (SIGKILL, by strace, which must be on the PATH) before each
   system call that changes a file; alone, or while another one publishes the same model.
2. On an object store (S3, moto's): a publisher is killed before each request that changes the
   store, and after it has taken effect; alone, or beside another one.
   Throughout a reader looks: what CURRENT names must be the version before or the new one, every
   version that is listed must be whole, and none may ever change. Then the vault takes all of them,
   and the next publisher must succeed.
3. From a trace of one publisher: what a rename shows is on the disk by then, as is everything in
   the end. A power cut loses what was not synced, a signal does not.
4. Files of a version are damaged and forged: the vault must refuse each version by the name of the
   file at fault. Copies in the vault are damaged: they must be replaced, or refused.

Exit status 1 where any of it fails.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice, product
from pathlib import Path

import fsspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from app.errors import InvalidModel, RepositoryUnavailable
from app.features.plan import NO_FEATURES
from app.repository.files import regular_files
from app.repository.publish import publish
from app.repository.store import Shelf, open_repository
from app.repository.vault import Vault
from loadtests.damaged_versions import Damage, damages, forgeries
from loadtests.forked_publishers import IN_VAIN, Publication, Publishers
from loadtests.s3_gate import Gate, s3_behind_a_gate
from loadtests.sync_order import lost_by_a_power_cut, trace
from tests.tiny_models import contract, training, write_artifact, write_contract

MODEL = "tiny"
_WEIGHTS_BYTES = 1_500_000
_SAY_EVERY_S = 20.0
_LOOKS_EVERY_S = 0.002
_ALL_KINDS_WITHIN = 100  # publishers in a folder
_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "proof",
    "AWS_SECRET_ACCESS_KEY": "proof",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class Failed(Exception):
    """A promise that did not hold."""


@dataclass
class Tally:
    """What was done and what went wrong."""

    runs: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _said_s: float = field(default_factory=time.monotonic)

    def done(self, what: str, killed_at: str | None = None) -> None:
        self.runs[what] += 1
        if killed_at is not None:
            self.killed[killed_at] += 1
        if time.monotonic() - self._said_s > _SAY_EVERY_S:
            self._said_s = time.monotonic()
            print(f"  {dict(self.runs)}, {len(self.failures)} failures", flush=True)

    def failed(self, what: str) -> None:
        self.failures.append(what)
        print(f"  FAILED {what}", flush=True)


class Reader:
    """Looks at a model as a server does, and remembers the digest of each version."""

    def __init__(self, repository: Shelf, scratch: Path) -> None:
        self._repository = repository
        self._scratch = scratch
        self._digests: dict[int, str] = {}

    def look(self) -> int:
        """The current version, 0 for none. Raises `Failed` where it is half or has changed."""
        try:
            current = self._repository.current(MODEL) or 0
            if current:
                self._take(current)
        except (InvalidModel, RepositoryUnavailable) as exc:
            raise Failed(str(exc)) from exc
        return current

    def look_at_all(self) -> list[int]:
        """The versions; with a new vault, so that all are copied."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            versions = list(self._repository.versions(MODEL))
            for version in versions:
                self._take(version)
        except (InvalidModel, RepositoryUnavailable) as exc:
            raise Failed(str(exc)) from exc
        return versions

    def _take(self, version: int) -> None:
        copy = Vault(self._scratch, self._repository).take(MODEL, version)
        known = self._digests.setdefault(version, copy.sha256)
        if known != copy.sha256:
            raise Failed(f"version {version} is another one than before")


@dataclass(frozen=True)
class Bench:
    """What the runs start from: an artifact, a signing key, and repositories to copy."""

    artifact: Path
    key: Path
    empty: Path
    published: Path
    small: Path
    """One version, all of whose files are."""
    scratch: Path

    def publication(self, model: str, variant: str = "later") -> Publication:
        return Publication(
            model,
            str(self.artifact),
            key=str(self.key) if variant == "signed" else None,
            keep_current=variant == "candidate",
        )


VARIANTS = ("later", "first", "signed", "candidate", "after a crash", "beside another")


@contextmanager
def bench() -> Iterator[Bench]:
    # Whom SIGKILL ends loses nothing of what it wrote: a disk would only be slower.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="hikyaku-prove-", dir=memory) as name:
        folder = Path(name)
        write_contract(folder / "empty" / MODEL, contract("binary"))
        artifacts = {}
        for size, weights_bytes in (("small", 2_000), ("published", _WEIGHTS_BYTES)):
            shutil.copytree(folder / "empty", folder / size)
            artifact = write_artifact(folder / f"{size}-artifact", "binary", training("binary"))
            (artifact / "weights.bin").write_bytes(random.Random(1).randbytes(weights_bytes))
            model_dir = folder / size / MODEL
            asyncio.run(publish(model_dir, artifact, NO_FEATURES, "proof", isolated=False))
            artifacts[size] = artifact
        key = folder / "key.pem"
        private = Ed25519PrivateKey.generate()
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        yield Bench(
            artifacts["published"],
            key,
            folder / "empty",
            folder / "published",
            folder / "small",
            folder / "scratch",
        )


def prove_folder(runs: int, bench: Bench, tally: Tally) -> None:
    """Each kind of call, the first of its kind, the second and so on, until none is left; all over
    again until there were as many runs."""
    with Publishers(killing=True) as forks, Publishers(killing=False) as next_ones:
        for _ in count():
            for variant, call in product(VARIANTS, IN_VAIN):
                for nth in count(1):
                    if tally.runs["in a folder"] >= runs:
                        return
                    if not killed_in_a_folder(forks, next_ones, bench, variant, call, nth, tally):
                        break


def killed_in_a_folder(
    forks: Publishers,
    next_ones: Publishers,
    bench: Bench,
    variant: str,
    call: str,
    nth: int,
    tally: Tally,
) -> bool:
    """Whether the publisher made so many calls."""
    folder = bench.scratch / "models"
    shutil.rmtree(bench.scratch, ignore_errors=True)
    shutil.copytree(bench.empty if variant == "first" else bench.published, folder)
    model = folder / MODEL
    if variant == "after a crash":
        shutil.copytree(model / "1", model / ".staging-of-a-crash")
        os.utime(model / ".staging-of-a-crash", (1, 1))
    publication = bench.publication(str(model), variant)
    others = [bench.publication(str(model))] * (variant == "beside another")

    def publish_and_kill() -> bool:
        ended, *other = forks.run(replace(publication, call=call, nth=nth), *others)
        if any(other):
            raise Failed(f"the publisher beside it ended with {other}")
        if ended not in {0, -signal.SIGKILL}:
            raise Failed(f"the publisher ended with {ended}")
        return ended != 0

    def publish_again() -> None:
        if next_ones.run(bench.publication(str(model))) != [0]:
            raise Failed("the next publisher did not publish")

    what = f"{variant}: {call} {nth}"
    killed = _held(
        open_repository(str(folder)), bench, variant, publish_and_kill, publish_again, what, tally
    )
    tally.done("in a folder", call if killed else None)
    # One that was killed while it removed the folder has made it young again.
    if call not in {"unlinkat", "rmdir"} and (model / ".staging-of-a-crash").exists():
        tally.failed(f"{what}: an old staging folder is still there")
    return killed


def prove_object_store(runs: int, bench: Bench, tally: Tally) -> None:
    """Before each request that changes the store and after it, all over again."""
    with s3_behind_a_gate() as gate:
        os.environ.update(_S3_ENVIRONMENT, AWS_ENDPOINT_URL=gate.url)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("proof")
        with Publishers(killing=False) as forks:
            for again in count():
                for variant, when in product(VARIANTS, ("before", "after")):
                    for nth in count(1):
                        number = tally.runs["on an object store"]
                        if number >= runs:
                            return
                        url = f"s3://proof/{number}/models"
                        start = bench.empty if variant == "first" else bench.published
                        for name in regular_files(start):
                            path = f"{url.removeprefix('s3://')}/{name}"
                            files.pipe_file(path, (start / name).read_bytes())
                        killed = _killed_on_a_store(
                            forks, bench, gate, url, variant, when, nth, tally
                        )
                        if not killed:
                            break
                assert again < runs


def _killed_on_a_store(
    forks: Publishers,
    bench: Bench,
    gate: Gate,
    url: str,
    variant: str,
    when: str,
    nth: int,
    tally: Tally,
) -> bool:
    """Whether so many requests came."""
    model = f"{url}/{MODEL}"
    publication = bench.publication(model, variant)
    others = [bench.publication(model)] * (variant == "beside another")

    def publish_and_kill() -> bool:
        requests = count(1)
        started = threading.Event()
        victim: list[int] = []

        def at_request() -> bool:
            started.wait()
            if next(requests) != nth:
                return True
            os.kill(victim[0], signal.SIGKILL)
            # Beside another publisher it may be the other's request, which must not be lost.
            return bool(others)

        if when == "before":
            gate.before = at_request
        else:
            gate.after = at_request
        victim.append(forks.start(publication, *others)[0])
        started.set()
        ended, *other = forks.wait()
        gate.repair()
        if any(other):
            raise Failed(f"the publisher beside it ended with {other}")
        if ended not in {0, -signal.SIGKILL}:
            raise Failed(f"the publisher ended with {ended}")
        return ended != 0

    def publish_again() -> None:
        if forks.run(bench.publication(model)) != [0]:
            raise Failed("the next publisher did not publish")

    what = f"{variant}: {when} request {nth}"
    shutil.rmtree(bench.scratch, ignore_errors=True)
    repository = open_repository(url)
    killed = _held(repository, bench, variant, publish_and_kill, publish_again, what, tally)
    tally.done("on an object store", f"{when} a request" if killed else None)
    return killed


def _held(
    repository: Shelf,
    bench: Bench,
    variant: str,
    publish_and_kill: Callable[[], bool],
    publish_again: Callable[[], None],
    what: str,
    tally: Tally,
) -> bool:
    """Run it while a reader looks; whether the publisher was killed."""
    reader = Reader(repository, bench.scratch / "vault")
    killed = False
    try:
        before, versions_before = reader.look(), reader.look_at_all()
        with _watched(reader):
            killed = publish_and_kill()
        after, versions_after = reader.look(), reader.look_at_all()
        added = set(versions_after) - set(versions_before)
        if not set(versions_before) <= set(versions_after):
            raise Failed(f"of {versions_before} only {versions_after} are left")
        if variant == "beside another":
            if after not in added:
                raise Failed(f"CURRENT names {after}, two publishers made {added}")
        elif len(added) > 1 or after not in {before, *added}:
            raise Failed(f"CURRENT names {after} after {before}, one publisher made {added}")
        if not killed and not added:
            raise Failed("a publisher that was not killed published nothing")
        with _watched(reader):
            publish_again()
        last, versions = reader.look(), reader.look_at_all()
        if last != max(versions) or last <= max(versions_after, default=0):
            raise Failed(f"the next publisher made {last} current, there are {versions}")
    except Failed as exc:
        tally.failed(f"{what}: {exc}")
    return killed


@contextmanager
def _watched(reader: Reader) -> Iterator[None]:
    """A reader looks all the time; raises `Failed` in the end where it saw what must not be."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOKS_EVERY_S):
            reader.look()

    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(watch)
        try:
            yield
        finally:
            over.set()
        watching.result()


def prove_order(bench: Bench, tally: Tally) -> None:
    """The first version, signed, with every file that a publisher writes."""
    shutil.rmtree(bench.scratch, ignore_errors=True)
    shutil.copytree(bench.empty, bench.scratch / "models")
    publication = bench.publication(str(bench.scratch / "models" / MODEL), "signed")
    calls = trace(publication, bench.scratch / "calls")
    for lost in lost_by_a_power_cut(calls):
        tally.failed(lost)
    tally.done("traced")


def prove_damage(variants: int, seed: int, bench: Bench, tally: Tally) -> None:
    """Of the files of a repository for the most part; forged ones, and copies in the vault."""
    shutil.rmtree(bench.scratch, ignore_errors=True)
    folder = bench.scratch / "models"
    shutil.copytree(bench.small, folder)
    version_dir = folder / MODEL / "1"
    intact = {name: (version_dir / name).read_bytes() for name in regular_files(version_dir)}
    repository = open_repository(str(folder))
    vault = Vault(bench.scratch / "vault", repository)
    chosen = vault.take(MODEL, 1).sha256
    vault.prune([], unused_s=0)
    tenth = variants // 10
    for damage in islice(damages(intact, seed), variants - 2 * tenth):
        _require_refusal(vault, version_dir, intact, damage, None, tally)
        tally.done("damaged in the repository")
    for damage in islice(forgeries(intact, seed), tenth):
        _require_refusal(vault, version_dir, intact, damage, chosen, tally)
        tally.done("forged")
    for damage in islice(damages(intact, seed + 1), tenth):
        _require_mending(vault, intact, damage, chosen, tally)
        tally.done("damaged in the vault")
    vault.take(MODEL, 1, chosen)
    shutil.rmtree(folder)
    _require_no_copy_without_repository(vault, intact, chosen, seed, tally)


def _require_refusal(
    vault: Vault,
    version_dir: Path,
    intact: Mapping[str, bytes],
    damage: Damage,
    chosen: str | None,
    tally: Tally,
) -> None:
    damage.apply(version_dir)
    try:
        vault.take(MODEL, 1, chosen)
    except InvalidModel as exc:
        if not any(str(exc).startswith(f"{version_dir / name}: ") for name in damage.blamed):
            tally.failed(f"{damage.what}: refused without the file's name: {exc}")
    except Exception as exc:  # whatever comes here would have come out of a server's thread
        tally.failed(f"{damage.what}: {type(exc).__name__}: {exc}")
    else:
        tally.failed(f"{damage.what}: was taken")
    for name in damage.files:
        (version_dir / name).write_bytes(intact[name])


def _require_mending(
    vault: Vault, intact: Mapping[str, bytes], damage: Damage, chosen: str, tally: Tally
) -> None:
    copy = vault.take(MODEL, 1, chosen).folder
    _damage_copy(copy, damage)
    try:
        vault.take(MODEL, 1, chosen)
    except Exception as exc:  # as above
        tally.failed(f"copy, {damage.what}: {type(exc).__name__}: {exc}")
    if {name: (copy / name).read_bytes() for name in regular_files(copy)} != intact:
        tally.failed(f"copy, {damage.what}: was not replaced")


def _require_no_copy_without_repository(
    vault: Vault, intact: Mapping[str, bytes], chosen: str, seed: int, tally: Tally
) -> None:
    """Nothing can replace a damaged copy now, and so it must not be taken."""
    copy = vault.take(MODEL, 1, chosen).folder
    for damage in islice(damages(intact, seed + 2), 200):
        _damage_copy(copy, damage)
        try:
            vault.take(MODEL, 1, chosen)
        except RepositoryUnavailable:
            pass
        except Exception as exc:  # as above
            tally.failed(f"copy, {damage.what}: {type(exc).__name__}: {exc}")
        else:
            tally.failed(f"copy without a repository, {damage.what}: was taken")
        for name in damage.files:
            (copy / name).unlink(missing_ok=True)
            (copy / name).write_bytes(intact[name])
        tally.done("damaged in the vault, repository away")


def _damage_copy(copy: Path, damage: Damage) -> None:
    for name in damage.files:
        (copy / name).chmod(0o600)
    damage.apply(copy)


def prove(runs: int, store_runs: int, damaged: int, seed: int) -> Tally:
    """All of it; what went wrong is in the tally."""
    tally = Tally()
    with bench() as things:
        prove_damage(damaged, seed, things, tally)
        prove_order(things, tally)
        prove_folder(runs, things, tally)
        for call in ("write", "fsync", "rename", "mkdir"):
            if runs >= _ALL_KINDS_WITHIN and not tally.killed[call]:
                tally.failed(f"nobody was killed at {call}")
        prove_object_store(store_runs, things, tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1_000, help="publishers in a folder")
    parser.add_argument("--store-runs", type=int, default=200, help="publishers on an object store")
    parser.add_argument("--damaged", type=int, default=20_000, help="damaged versions")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started_s = time.monotonic()
    tally = prove(arguments.runs, arguments.store_runs, arguments.damaged, arguments.seed)
    for what, times in tally.runs.items():
        print(f"{times:7,} {what}")
    for what, times in sorted(tally.killed.items()):
        print(f"{times:7,} killed at {what}")
    print(
        f"{len(tally.failures):7,} failures; {time.monotonic() - started_s:.0f} s, "
        f"seed {arguments.seed}"
    )
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
