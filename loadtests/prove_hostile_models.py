"""Shows that no model file of a hostile corpus is believed, and that the server answers meanwhile.

    python -m loadtests.prove_hostile_models

Each of `loadtests.hostile_models` is verified as a published version, one after another, by the
process that also serves a tiny model. Meanwhile another process asks that model 100 times a second
and checks every answer. Where strace is installed, the files are looked at that are opened for
those models that name files. Exit status 1 unless each model is refused with its reason within
10 s, every answer is right, no file but those of the model, Python and its libraries is opened, no
child is left, and a good model is accepted.
"""

import argparse
import asyncio
import json
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import uvloop

import app
from app.api.http_door import HttpDoor
from app.api.http_protocol import protocol_of
from app.config import load_settings
from app.errors import InvalidModel
from app.main import create_application
from app.repository.verify import verify_version
from app.telemetry.metrics import Metrics
from loadtests.hostile_models import (
    CONTRACT,
    Hostile,
    corpus,
    honest,
    publish_as_it_is,
    reaching_out,
)
from tests.api.conftest import CLOCK, IN_MEMORY
from tests.api.http_serving import port_of, served
from tests.backends.isolated_models import processes
from tests.tiny_models import write_model

MAX_S = 10.0
_WITHIN_S = 9.0
_ENDLESS_WITHIN_S = 4.5  # twice that, for opening and for executing, is less than 10 s
_ASK_EVERY_S = 0.01
_BEAT_S = 0.01
_ALONE_S = 3.0
_OPENED = re.compile(r'\d+ +open(?:at|at2)?\((?:[^"]*, )?"(/[^"]*)".* = \d+')
_HONEST = Hostile("honest", "", honest)


@dataclass
class Result:
    """What was seen: faults in words, and figures."""

    faults: list[str] = field(default_factory=list)
    refused_s: dict[str, float] = field(default_factory=dict)
    asked: int = 0
    latency_ms: Sequence[float] = ()
    late_ms: list[float] = field(default_factory=list)
    """How late the beats of the server's event loop were."""
    late_alone_ms: list[float] = field(default_factory=list)
    """The same while it only served."""


async def prove(folder: Path, hostiles: Sequence[Hostile], *, audit: bool) -> Result:
    """Verify each beside a server under load, and a good one after them."""
    result = Result()
    async with _serving(folder) as port, _asking(port, result):
        beating = asyncio.create_task(_beat(result.late_alone_ms))
        await asyncio.sleep(_ALONE_S)
        beating.cancel()
        beating = asyncio.create_task(_beat(result.late_ms))
        for at, hostile in enumerate(hostiles):
            await _verify(hostile, folder / str(at) / "1", result)
        honest_version = publish_as_it_is(_HONEST, folder / "honest" / "1")
        try:
            await verify_version(honest_version, CONTRACT, within_s=MAX_S)
        except InvalidModel as exc:
            result.faults.append(f"a good model was refused: {exc}")
        beating.cancel()
    if processes():
        result.faults.append(f"{len(processes())} processes are left")
    if audit:
        reaching = {each.name for each in reaching_out()}
        for at, hostile in enumerate(hostiles):
            if hostile.name in reaching:
                result.faults += await _audited(hostile, at, folder)
    return result


async def _verify(hostile: Hostile, folder: Path, result: Result) -> None:
    version = await asyncio.to_thread(publish_as_it_is, hostile, folder)
    started_s = time.monotonic()
    try:
        endless = "deadline" in hostile.reason
        within_s = _ENDLESS_WITHIN_S if endless else _WITHIN_S
        await verify_version(version, CONTRACT, within_s=within_s)
    except InvalidModel as exc:
        said = str(exc)
    else:
        result.faults.append(f"{hostile.name}: was accepted")
        return
    result.refused_s[hostile.name] = took_s = time.monotonic() - started_s
    if not re.search(hostile.reason, said):
        result.faults.append(f"{hostile.name}: was refused for another reason: {said}")
    if took_s > MAX_S:
        result.faults.append(f"{hostile.name}: was refused after {took_s:.1f} s")
    if not said.isprintable() or len(said) > 4_000:
        result.faults.append(f"{hostile.name}: was refused with {said[:200]!r}")


@asynccontextmanager
async def _serving(folder: Path) -> AsyncIterator[int]:
    """A server in this process, of the tiny model `regression`."""
    await write_model(folder / "models", "regression", "regression")
    settings = load_settings(
        {
            "MODEL_REPOSITORY": str(folder / "models"),
            "HIKYAKU_FEATURE_REPO": str(folder / "none"),
            "HIKYAKU_REPLAY_CLOCK": CLOCK,
        }
    )
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        application = create_application(settings, IN_MEMORY, metrics)
        await stack.enter_async_context(application.lifespan())
        protocol = protocol_of(HttpDoor(application.hot_paths, metrics))
        yield port_of(await stack.enter_async_context(served(application, protocol)))


@asynccontextmanager
async def _asking(port: int, result: Result) -> AsyncIterator[None]:
    """Another process asks, until the end of its input."""
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtests.prove_hostile_models", "--ask", str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    await client.stdout.readline()  # it has its first answer
    yield
    said, _ = await client.communicate(b"")
    document = json.loads(said)
    result.asked = document["asked"]
    result.latency_ms = document["latency_ms"]
    result.faults += document["faults"]


async def _ask(port: int) -> None:
    """Ask every 10 ms, also while answers are due, and check each."""
    faults: list[str] = []
    latency_ms: list[float] = []
    url = f"http://127.0.0.1:{port}/v1/models/regression:predict"

    async def once(client: httpx.AsyncClient, number: int) -> None:
        started_s = time.monotonic()
        try:
            answer = await client.post(url, json={"instances": [{"a": number, "b": 1.0}]})
            value = answer.json()["predictions"][0]["value"]
            if answer.status_code != 200 or value != number + 2:
                faults.append(f"a prediction: {answer.status_code} {answer.text[:200]}")
        except (httpx.HTTPError, KeyError) as exc:
            faults.append(f"a prediction: {type(exc).__name__} {exc}")
        latency_ms.append((time.monotonic() - started_s) * 1e3)

    async with httpx.AsyncClient(timeout=10) as client, asyncio.TaskGroup() as asking:
        await once(client, 0)
        print("asking", flush=True)
        told_to_stop = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        number = 0
        while not told_to_stop.done():
            number = (number + 1) % 1_000
            asking.create_task(once(client, number))
            await asyncio.sleep(_ASK_EVERY_S)
    document = {"asked": len(latency_ms), "latency_ms": latency_ms, "faults": faults[:20]}
    print(json.dumps(document), flush=True)


async def _beat(late_ms: list[float]) -> None:
    while True:
        due_s = time.monotonic() + _BEAT_S
        await asyncio.sleep(_BEAT_S)
        late_ms.append((time.monotonic() - due_s) * 1e3)


async def _audited(hostile: Hostile, at: int, folder: Path) -> list[str]:
    """Verify it once more below strace; what its child opened that it should not."""
    log = folder / f"{at}.strace"
    version = folder / f"audited-{at}" / "1"
    strace = await asyncio.create_subprocess_exec(
        *(
            "strace",
            "-f",
            "-o",
            str(log),
            "-e",
            "trace=open,openat,openat2,execve,landlock_restrict_self",
        ),
        *(sys.executable, "-m", "loadtests.prove_hostile_models", "--verify", hostile.name),
        str(version),
        stderr=asyncio.subprocess.DEVNULL,
    )
    if await strace.wait() != 0:
        return [f"{hostile.name}: below strace it ended with {strace.returncode}"]
    lines = log.read_text(errors="replace").splitlines()
    confined = [at for at, line in enumerate(lines) if "landlock_restrict_self" in line]
    if not any("isolated_child" in line for line in lines):
        return []  # refused for its files, without opening any
    if not confined:
        return [f"{hostile.name}: its child may read other files: no Landlock"]
    readable = (
        *(str(version), sys.prefix, sys.base_prefix, str(Path(app.__file__).parent.parent)),
        *(
            "/proc/",
            "/sys/",
            "/usr/",
            "/lib",
            "/dev/null",
            "/dev/urandom",
            "/etc/ld.so.",
            "/etc/os-release",
        ),
    )
    # Before that it was Python alone, which had heard of no model yet.
    names = (_OPENED.match(line) for line in lines[confined[0] :])
    return [
        f"{hostile.name}: its child opened {name[1]}"
        for name in names
        if name is not None and not name[1].startswith(readable)
    ]


async def _verify_alone(name: str, folder: Path) -> None:
    (hostile,) = [each for each in corpus() if each.name == name]
    result = Result()
    await _verify(hostile, folder, result)


def _say(result: Result, count: int) -> None:
    slowest = max(result.refused_s, key=result.refused_s.__getitem__)
    print(f"  {len(result.refused_s)} of {count} hostile models were refused")
    print(f"  slowest: {slowest!r}, {result.refused_s[slowest]:.1f} s")
    of_clients, of_beats, alone = (
        quantiles(values, n=1000)
        for values in (result.latency_ms, result.late_ms, result.late_alone_ms)
    )
    print(
        f"  {result.asked:,} predictions meanwhile, p50 {of_clients[499]:.1f} ms, "
        f"p99 {of_clients[989]:.1f} ms, slowest {max(result.latency_ms):.0f} ms"
    )
    print(
        f"  event loop late: p99 {of_beats[989]:.1f} ms, most {max(result.late_ms):.0f} ms; "
        f"before, alone: p99 {alone[989]:.1f} ms, most {max(result.late_alone_ms):.0f} ms"
    )
    for fault in result.faults:
        print(f"  FAULT {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="those whose name holds it")
    parser.add_argument("--no-audit", action="store_true", help="without strace")
    parser.add_argument("--ask", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--verify", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.ask is not None:
            runner.run(_ask(arguments.ask))
            return 0
        if arguments.verify is not None:
            runner.run(_verify_alone(arguments.verify[0], Path(arguments.verify[1])))
            return 0
        hostiles = [each for each in corpus() if arguments.only in each.name]
        audit = not arguments.no_audit and shutil.which("strace") is not None
        with tempfile.TemporaryDirectory() as folder:
            result = runner.run(prove(Path(folder), hostiles, audit=audit))
    _say(result, len(hostiles))
    if not audit:
        print("  the files that were opened were not looked at: no strace")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
