"""Shows that both doors answer the same: the protocol below ASGI, and the ASGI application.

    python -m loadtests.prove_two_doors --requests 50000 --seed 1

The same random requests (good and bad ones, framed in many ways, cut anywhere, one by one and ahead
of their answers) go over the same random connections to two servers in this process: one has our
protocol, the other uvicorn's own. Status, body (but for the request id) and the counters of the
metrics must be the same; status and body also for a few bodies of megabytes to paths that are not
hot. Exit status 1 where they are not. `INTENDED` lists what may differ.
"""

import argparse
import asyncio
import json
import logging
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from app.api.http_door import HttpDoor
from app.api.http_protocol import protocol_of
from app.config import load_settings
from app.main import create_application
from app.telemetry.metrics import Metrics
from tests.api.conftest import CLOCK, IN_MEMORY
from tests.api.http_serving import chunked, port_of, request, served
from tests.tiny_models import Kind, write_model

MAX_BODY_BYTES = 3000
LARGE_BODY_BYTES = 2_000_000
AT_ONCE = 16
_CUT_EVERY = 4
_HANGS_AFTER_S = 30
_KINDS: Sequence[Kind] = ("binary", "regression", "multiclass", "stored")
_TE = "Transfer-Encoding: chunked"
_H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
_GOOD = json.dumps({"instances": [{"a": 2.0, "b": 1.0}]}).encode()
_BINARY = "/v1/models/binary:predict"

INTENDED: Mapping[str, tuple[bytes, int, int]] = {
    "a request without a host": (
        request(_GOOD, target=_BINARY).replace(b"Host: localhost\r\n", b""),
        *(400, 200),
    ),
    "a request with two hosts": (request(_GOOD, "Host: other", target=_BINARY), 400, 200),
    "a body with a second coding": (
        request(b"0\r\n\r\n", target=_BINARY, framing="Transfer-Encoding: gzip, chunked"),
        *(400, 400),
    ),
    "chunks in HTTP/1.0": (
        request(chunked(_GOOD), target=_BINARY, framing=_TE, version="1.0"),
        *(400, 200),
    ),
    "HTTP/2 without having agreed on it": (request(_GOOD, target=_BINARY, version="2.0"), 400, 200),
    "HTTP/0.9": (b"GET /v1/models\r\n\r\n", 400, 200),
    "a body beside an offer of another protocol": (request(_GOOD, *_H2C, target=_BINARY), 200, 400),
    "a head of 70 kB": (request(_GOOD, "X: " + "x" * 70_000, target=_BINARY), 431, 200),
}
"""Requests that the doors answer differently: the status below ASGI, and through uvicorn's own
protocol, which is less strict, has no limit for a head and loses the body of a client that offers
HTTP/2. What both refuse as no request is 400 at both, but text at uvicorn's. Beside them, below
ASGI: a client that leaves takes its prediction out of the queue; who sends ahead while refused is
closed; heads and connections have deadlines."""

MALFORMED: Sequence[bytes] = (
    request(b"{}", "Content-Length: 3", target=_BINARY),
    request(b"0\r\n\r\n", "Content-Length: 5", target=_BINARY, framing=_TE),
    request(b"{}", "X: a\r\n b", target=_BINARY),
    request(b"{}", target=_BINARY).replace(b"\r\n", b"\n"),
    request(b"{}", "X : a", target=_BINARY),
    request(b"zz\r\n{}\r\n0\r\n\r\n", target=_BINARY, framing=_TE),
    request(b"{}", target="predict"),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)
"""What both doors refuse as no request."""


@dataclass(frozen=True)
class Sent:
    """One request."""

    data: bytes
    method: str
    last: bool = False
    """The connection ends with it, at one door at least."""
    whole: bool = False
    """It is not cut: uvicorn's protocol would reset the connection while more of it comes."""
    malformed: bool = False


@dataclass(frozen=True)
class Conversation:
    """The requests of one connection, sent in `pieces` that are cut anywhere."""

    requests: Sequence[Sent]
    pieces: Sequence[Sequence[bytes]]
    """Of each request; of all of them together where they are sent ahead of their answers."""
    ahead: bool


Seen = tuple[int, bytes]
"""Status and body of an answer, without what is its own."""


def conversations(requests: int, seed: int) -> Iterator[Conversation]:
    """As many as hold so many requests. The same seed says the same."""
    rng = random.Random(seed)
    while requests > 0:
        ahead = rng.random() < 0.3
        sent = [_request(rng) for _ in range(rng.choice((1, 2, 5, 20)))]
        final = _malformed(rng) if not ahead and rng.random() < 0.1 else _request(rng)
        kept = [*(one for one in sent[1:] if not one.last), final]
        requests -= len(kept)
        together = Sent(b"".join(one.data for one in kept), "", whole=kept[-1].whole)
        pieces = [_cut(one, rng) for one in ([together] if ahead else kept)]
        yield Conversation(kept, pieces, ahead)


def _cut(sent: Sent, rng: random.Random) -> list[bytes]:
    data = sent.data
    if sent.whole or rng.randrange(_CUT_EVERY):
        return [data]
    if len(data) < 400 and rng.random() < 0.1:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randint(1, 4)))})
    return [data[start:end] for start, end in pairwise(cuts)]


def _malformed(rng: random.Random) -> Sent:
    return Sent(rng.choice(MALFORMED), "POST", last=True, whole=True, malformed=True)


def _request(rng: random.Random) -> Sent:
    if rng.random() < 0.15:
        return _elsewhere(rng)
    kind = rng.choice(_KINDS)
    body = _body(kind, rng)
    headers = [header for header in map(rng.choice, _HEADERS) if header]
    method = rng.choice(("GET", "HEAD", "OPTIONS", "PUT")) if rng.random() < 0.05 else "POST"
    target = rng.choice(_TARGETS) if rng.random() < 0.1 else f"/v1/models/{kind}:predict"
    version = "1.0" if rng.random() < 0.02 else "1.1"
    in_chunks = version == "1.1" and rng.random() < 0.25
    framed = _in_chunks(body, rng) if in_chunks else body
    data = request(
        framed,
        *headers,
        method=method,
        target=target,
        version=version,
        framing=_TE if in_chunks else None,
    )
    # The ASGI application cannot see that the chunks of a body are here already, and says that the
    # connection ends with its refusal.
    refused = method != "POST" or target in _TARGETS or bool(_REFUSED.intersection(headers))
    # A proxy's callers are no operators.
    refused |= bool(set(_ROUTES).intersection(headers)) and "X-Forwarded-For: 192.0.2.7" in headers
    ends = in_chunks and (refused or len(body) > MAX_BODY_BYTES)
    closes = version == "1.0" or "Connection: close" in headers
    if rng.random() < 0.05:
        data = b"\r\n" + data
    return Sent(data, method, last=ends or closes, whole=ends)


def _in_chunks(body: bytes, rng: random.Random) -> bytes:
    cuts = sorted({0, len(body), *(rng.randrange(len(body) + 1) for _ in range(3))})
    chunks = [body[start:end] for start, end in pairwise(cuts)]
    return chunked(*chunks, trailer=rng.choice((b"", b"X-Checksum: 1\r\n")))


_ROUTES = ("Hikyaku-Route: champion", "hikyaku-route: canary", "Hikyaku-Route: both")
_HEADERS: Sequence[Sequence[str]] = (
    [""] * 20 + ["X-Request-Id: mine", "x-request-id: not fit", "X-Request-Id: " + "x" * 200],
    [""] * 20 + ["Request-Timeout-Ms: 30000", "request-timeout-ms: 0", "Request-Timeout-Ms: soon"],
    [""] * 20 + ["Request-Priority: bulk", "Request-Priority: live", "REQUEST-PRIORITY: high"],
    [""] * 20 + ["Content-Encoding: gzip", "Content-Encoding: identity", "content-encoding: br"],
    [""] * 9 + ["Connection: keep-alive", "Connection: close"],
    ["Content-Type: application/json", "content-type:text/plain", "", "Accept: */*"],
    [""] * 9 + ["X-Forwarded-For: 192.0.2.7", "Cookie: a=b", "X-Empty:", "X-Bytes: \t a  b \t"],
    [""] * 20 + ["Routing-Key: someone", "Routing-Key:", *_ROUTES],
)
_REFUSED = {
    *("Request-Timeout-Ms: soon", "request-timeout-ms: 0", "REQUEST-PRIORITY: high"),
    *("Content-Encoding: gzip", "content-encoding: br"),
    "Hikyaku-Route: both",
}
_TARGETS = (
    "/v1/models/nobody:predict",
    "/v1/models/:predict",
    "/v1/models/bin%61ry:predict",
    "/v1/models/binary%3Apredict",
    "http://test/v1/models/binary:predict",
    "/v1/models/binary:predict?verbose=true",
    "/v1/models/binary:predict/",
    "//v1/models/binary:predict",
    "/v1/models/binary:explain",
    "/v1/models/%00:predict",
    "/v1/models/%F0%9F%9A%80:predict",
    "/v1/models/binary:predict#fragment",
)


def _elsewhere(rng: random.Random) -> Sent:
    """What FastAPI answers at both."""
    method, target, body = rng.choice(
        (
            ("GET", "/v1/models", b""),
            ("HEAD", "/v1/models", b""),
            ("GET", "/v1/models/binary", b""),
            ("GET", "/v1/models/nobody", b""),
            ("GET", "/v2/health/live", b""),
            ("GET", "/v2/nothing", b""),
            ("GET", "/nothing", b""),
            ("DELETE", "/v1/models", b""),
            ("OPTIONS", "*", b""),
            ("POST", "/v1/models", b"{}"),
            ("PUT", "/v1/replay-clock", json.dumps({"now": CLOCK}).encode()),
            ("PUT", "/v1/replay-clock", b'{"now": "2013-01-01T00:00:00Z"}'),
            ("PUT", "/v1/replay-clock", b"{"),
            ("PUT", "/v1/replay-clock", b"x" * (MAX_BODY_BYTES + 1)),
            ("GET", "/v1/replay-clock", b""),
        )
    )
    in_chunks = bool(body) and rng.random() < 0.3
    framed = chunked(body) if in_chunks else body
    data = request(framed, method=method, target=target, framing=_TE if in_chunks else None)
    ends = in_chunks and len(body) > MAX_BODY_BYTES
    return Sent(data, method, last=ends, whole=ends)


def large_conversations() -> Iterator[Conversation]:
    """Bodies of `LARGE_BODY_BYTES` that FastAPI reads and that it refuses unread, by length and in
    chunks, each with a request behind it."""
    body = json.dumps({"now": CLOCK}).encode().ljust(LARGE_BODY_BYTES)
    parts = (body[at : at + 50_000] for at in range(0, LARGE_BODY_BYTES, 50_000))
    in_chunks = chunked(*parts)
    after = Sent(request(b"", method="GET", target="/v1/replay-clock"), "GET")
    for method, target in (("PUT", "/v1/replay-clock"), ("POST", "/v1/models")):
        for framed, framing in ((body, None), (in_chunks, _TE)):
            data = request(framed, method=method, target=target, framing=framing)
            yield Conversation([Sent(data, method), after], [[data], [after.data]], ahead=False)
            yield Conversation([Sent(data, method), after], [[data, after.data]], ahead=True)


def _body(kind: Kind, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return rng.choice(_BAD_BODIES)
    instances = [_instance(kind, rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    document: dict[str, Any] = {"instances": instances}
    if rng.random() < 0.1:
        document["verbose"] = rng.random() < 0.7
    return json.dumps(document, indent=rng.choice((None, None, 1))).encode()


def _instance(kind: Kind, rng: random.Random) -> dict[str, Any]:
    instance: dict[str, Any] = {
        "a": rng.choice((round(rng.uniform(-9, 9), 3), rng.randint(-9, 9))),
        "b": rng.random(),
    }
    if kind == "stored":
        instance = {
            "driver_id": rng.choice((1, 2, 99, None)),
            "city": rng.choice(("kyoto", "rome", "", None, "京都", "x" * 99)),
            "distance": rng.randint(0, 9),
        }
    if rng.random() < 0.05:
        instance[rng.choice(("a", "c", "driver:trips"))] = rng.choice((None, "1", 3, []))
    return instance


_BAD_BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b'{"instances": []}',
    b'{"instances": {}}',
    b'{"instances": [1]}',
    b'{"instances": [{"a": NaN, "b": 1}]}',
    b'{"instances": [{"a": 1e999, "b": 1}]}',
    b'{"instances": [{"a": -Infinity, "b": 1}]}',
    b'{"instances": [{"a": 1' + b"0" * 400 + b', "b": 1}]}',
    b'{"instances": [{"a": 01, "b": 1}]}',
    b'{"instances": [{"a": true, "b": 1}]}',
    b'{"instances": [{"a": "1", "b": 1}]}',
    b'{"instances": [{"a": 1, "a": 2, "b": 1}]}',
    b'{"instances": [{"a": 1, "b": 1}]} trailing',
    b'\xef\xbb\xbf{"instances": [{"a": 1, "b": 1}]}',
    b'{"instances": [{"city": "\\ud800", "driver_id": 1, "distance": 1}]}',
    b'{"instances": [{"city": "\xff", "driver_id": 1, "distance": 1}]}',
    b'{"instances": [{"city": "a\\u0000b", "driver_id": 1, "distance": 1}]}',
    b'{"instances": [{"driver_id": 99999999999999999999, "city": "", "distance": 1}]}',
    b'{"instances": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"instances": [{"a": 1, "b": 1}], "verbose": "yes"}',
    b" " * MAX_BODY_BYTES,
    b" " * (MAX_BODY_BYTES + 1),
    b" " * (10 * MAX_BODY_BYTES),
)

_OWN = re.compile(
    rb'"request_id":"[0-9a-f]{32}"|under request id [0-9a-f]{32}|"workers":\{"[^"]*"|'
    rb'"per_s":[0-9.e-]+'
)


async def answers(port: int, conversation: Conversation) -> list[Seen]:
    """What one door says to it, until it ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen: list[Seen] = []
    groups = [conversation.requests] if conversation.ahead else [[r] for r in conversation.requests]
    try:
        async with asyncio.timeout(_HANGS_AFTER_S):
            for group, pieces in zip(groups, conversation.pieces, strict=True):
                for piece in pieces:
                    if writer.transport.is_closing():
                        break  # what was said before that can be read
                    writer.write(piece)
                    await asyncio.sleep(0)
                for one in group:
                    seen.append(await _answer(reader, one))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # it was closed: the other door must close it there, too
    finally:
        writer.close()
    return seen


async def _answer(reader: asyncio.StreamReader, sent: Sent) -> Seen:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if length is None:
        raise ValueError(f"an answer without a length: {head!r}")
    body = b"" if sent.method == "HEAD" else await reader.readexactly(int(length[1]))
    return status, b"" if sent.malformed else _OWN.sub(b"", body)


def counters(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What must be the same at both doors: counts and values of requests, not times, and not how
    they met in batches."""
    names = re.compile(
        "hikyaku_(requests_total|request_duration_seconds_count|prediction_(bucket|sum)|"
        "degraded_requests_total|feature_values_total|substituted_values_total|"
        "queue_refusals_total|left_queue_total|stage_duration_seconds_count)"
    )
    metrics.record()  # what was kept back
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): round(sample.value, 3)
        for family in metrics.registry.collect()
        for sample in family.samples
        if names.fullmatch(sample.name)
    }


@asynccontextmanager
async def doors(
    folder: Path, max_body_bytes: int = MAX_BODY_BYTES
) -> AsyncIterator[tuple[Mapping[str, int], Mapping[str, Metrics]]]:
    """The ports and the metrics of two servers of the same models: `below ASGI` and `ASGI`."""
    for kind in _KINDS:
        await write_model(folder, kind, kind, limits={"default_timeout_ms": 30_000})
    environment = {
        "MODEL_REPOSITORY": str(folder),
        "HIKYAKU_FEATURE_REPO": str(folder / "none"),
        "HIKYAKU_REPLAY_CLOCK": CLOCK,
        "HIKYAKU_MAX_BODY_BYTES": str(max_body_bytes),
    }
    metrics = {"below ASGI": Metrics(), "ASGI": Metrics()}
    ports = {}
    async with AsyncExitStack() as stack:
        for name, own in metrics.items():
            # Of its own, or each would tell of both workers.
            work = {"HIKYAKU_WORK_DIR": str(folder.parent / name.replace(" ", "-"))}
            application = create_application(
                load_settings(environment | work), IN_MEMORY, own, isolated_verification=False
            )
            await stack.enter_async_context(application.lifespan())
            http: Any = "httptools"
            if name == "below ASGI":
                http = protocol_of(HttpDoor(application.hot_paths, own))
            ports[name] = port_of(await stack.enter_async_context(served(application, http)))
        yield ports, metrics


@dataclass
class Result:
    """What was seen at both doors."""

    statuses: Counter[int]
    different: list[str]


async def compare(folder: Path, requests: int, seed: int) -> Result:
    """Ask both doors the same; `folder` gets the models."""
    result = Result(Counter(), [])
    async with doors(folder / "models") as (ports, metrics):
        turn = asyncio.Semaphore(AT_ONCE)

        async def ask(conversation: Conversation) -> None:
            try:
                below, through = [await answers(port, conversation) for port in ports.values()]
            finally:
                turn.release()
            result.statuses.update(status for status, _ in below)
            if below != through:
                result.different.append(_shown(conversation, below, through))

        async with asyncio.TaskGroup() as asked:
            for conversation in conversations(requests, seed):
                await turn.acquire()
                asked.create_task(ask(conversation))
        counted = {name: counters(own) for name, own in metrics.items()}
        for key in sorted(counted["below ASGI"].keys() | counted["ASGI"].keys()):
            below_it, through_it = (own.get(key, 0.0) for own in counted.values())
            if below_it != through_it:
                result.different.append(f"{key}: {below_it} below ASGI, {through_it} through it")
        for name, (data, *expected) in INTENDED.items():
            alone = Conversation([Sent(data, "POST", last=True, malformed=True)], [[data]], False)
            found = [(await answers(port, alone))[0][0] for port in ports.values()]
            if found != expected:
                result.different.append(f"{name}: {found}, expected {expected}")
    async with doors(folder / "of large bodies", LARGE_BODY_BYTES) as (ports, _):
        for conversation in large_conversations():
            below, through = [await answers(port, conversation) for port in ports.values()]
            if below != through or len(below) != len(conversation.requests):
                result.different.append(_shown(conversation, below, through))
    return result


def _shown(conversation: Conversation, below: Sequence[Seen], through: Sequence[Seen]) -> str:
    at = next(
        (n for n, (one, other) in enumerate(zip(below, through, strict=False)) if one != other),
        min(len(below), len(through)),
    )
    data = conversation.requests[at].data
    return (
        f"{data[:300]!r}{' (sent ahead)' if conversation.ahead else ''}, answer {at}: "
        f"{below[at : at + 1]} below ASGI, {through[at : at + 1]} through it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a line for each malformed request
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        result = runner.run(compare(Path(folder), arguments.requests, arguments.seed))
    print(f"{result.statuses.total()} answers:", dict(sorted(result.statuses.items())))
    for line in result.different[:20]:
        print("DIFFERENT:", line)
    print(f"{len(result.different)} differences")
    sys.exit(1 if result.different else 0)


if __name__ == "__main__":
    main()
