"""Who may change something, at both doors, by whatever trick it is asked."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.api.admit import Caller, Doorkeeper
from app.api.body import BodyReader
from app.api.gateway import Gateway
from app.api.hot_paths import HotPaths, headers_of
from app.api.http_door import HttpDoor
from app.api.http_protocol import protocol_of
from app.api.operators import Operators, operators_of
from app.api.predictions import PredictOperation
from app.config import load_settings
from app.errors import ConfigurationError, Forbidden, RequestError, Unauthorized
from app.telemetry.metrics import Metrics
from tests.api.conftest import Serve
from tests.api.http_serving import MAX_BODY_BYTES, EchoPredictions, port_of, served

TOKEN = "a-secret-of-16-and-more"
OTHER = "another-secret-of-his"
LOOKING = {"GET", "HEAD", "OPTIONS"}
# What changes something, now or in a later step, and what is only looked at when it is asked so.
ROUTES = (
    ("POST", "/v1/models/m:load"),
    ("POST", "/v1/models/m:unload"),
    ("POST", "/v1/models/m:rollback"),
    ("POST", "/v1/models/m:feedback"),
    ("POST", "/v1/models/m/release"),
    ("PATCH", "/v1/models/m/release"),
    ("DELETE", "/v1/models/m/release"),
    ("PUT", "/v1/replay-clock"),
    ("POST", "/v2/repository/models/m/load"),
    ("PUT", "/v1/models"),
    ("PUT", "/metrics"),
    ("DELETE", "/docs"),
)


def settings(**environment: str) -> Any:
    return load_settings({f"HIKYAKU_{name}": value for name, value in environment.items()})


def with_tokens() -> Operators:
    return operators_of(settings(OPERATOR_TOKEN=f"alice:{TOKEN}\n\nbob:{OTHER}"))


def this_machine() -> Operators:
    return operators_of(settings())


class Rest:
    """An application that does whatever it is asked."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, str | None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller = scope["state"]["caller"]
        self.done.append((scope["method"], scope["path"], caller.operator))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def gateway(operators: Operators, rest: Rest) -> Gateway:
    operation = cast(PredictOperation, EchoPredictions())
    hot_paths = HotPaths(Doorkeeper(MAX_BODY_BYTES, operators), operation, Metrics())
    bodies = BodyReader(MAX_BODY_BYTES, 1, hot_paths.bodies)
    return Gateway(hot_paths, cast(FastAPI, rest), bodies)


DOORS: Mapping[str, Callable[[Gateway], Any]] = {
    "protocol": lambda application: protocol_of(HttpDoor(application.hot_paths, Metrics())),
    "asgi": lambda application: "httptools",
}


def asked(method: str, target: str, *headers: str, version: str = "1.1") -> bytes:
    lines = [
        f"{method} {target} HTTP/{version}",
        *headers,
        "Content-Length: 2",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", "{}"]).encode("latin-1")


def target_tricks(path: str) -> Iterator[str]:
    first, _, rest = path[1:].partition("/")
    yield from (path, f"{path}/", f"{path}//", f"/{path}", f"//{path}", f"/.{path}", f"{path}/.")
    yield from (f"/v1/..{path}", f"/x/..{path}", f"{path}/..", f"{path}/../m:predict")
    yield from (f"/{first}//{rest}", f"/{first}%2f{rest}", f"/{first}%2F{rest}", f"/%2f{path[1:]}")
    yield from (f"/{first}/%2e%2e{path}", f"/{first}/./{rest}", f"{path}%00", f"{path}%20")
    yield from (path.upper(), path.title(), path.replace("o", "%6f"), path.replace(":", "%3a"))
    yield from (path.replace(":", "%3A"), path.replace(":", "%253a"), path.replace(":", "::"))
    yield from (
        f"{path}?x=:predict",
        f"{path};:predict",
        f"{path}%3f:predict",
        f"{path}%23:predict",
    )
    yield from (f"{path}:predict", f"/v1/models/m:predict{path}", f"/v1/models/m:predict/..{path}")
    yield from (
        f"{path}/m:predict",
        f"{path}%0a/v1/models/m:predict",
        f"{path}#/v1/models/m:predict",
    )
    yield from (f"http://localhost{path}", f"http://evil{path}", f"/v1/models/m:predict%2f..{path}")
    yield from (f"{path}\\", f"{path}%5c", path.replace("/", "%5c"), f"{path}.json", f"*{path}")


def method_tricks(method: str) -> Iterator[str]:
    yield from (method.lower(), method.title(), "TRACE", "PROPFIND", "QUERY", "M-SEARCH")


def header_tricks(method: str) -> Iterator[tuple[str, ...]]:
    """None of them says that an operator calls."""
    for scheme in ("Bearer", "bearer", "Basic", "Token", "ApiKey", ""):
        for credential in (
            "",
            " ",
            " x",
            " null",
            f" {TOKEN[:-1]}",
            f" {TOKEN}x",
            f" alice:{TOKEN}",
        ):
            yield (f"Authorization: {scheme}{credential}",)
    yield (f"Authorization: Basic {TOKEN}",)
    yield (f"Authorization: {TOKEN}",)
    yield (f"Authorization: Bearer {TOKEN.upper()}",)
    yield (f"Authorization: Bearer {TOKEN} {TOKEN}",)
    yield (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x")
    yield ("Authorization: Bearer x", f"Authorization: Bearer {TOKEN}")
    yield ("Authorization:", f"Authorization: Bearer {TOKEN}")
    yield (f"Authorization: Bearer {TOKEN}, Bearer x",)
    yield (f"Proxy-Authorization: Bearer {TOKEN}",)
    yield (f"X-Authorization: Bearer {TOKEN}",)
    yield (f"Authorization_: Bearer {TOKEN}",)
    yield (f"Cookie: Authorization=Bearer {TOKEN}",)
    yield (f"X-Api-Key: {TOKEN}",)
    for name in ("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"):
        yield (f"{name}: GET",)
        yield (f"{name}: {method}",)
    for name in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix", "X-Forwarded-Uri"):
        yield (f"{name}: /v1/models/m:predict",)
    for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP"):
        yield (f"{name}: 127.0.0.1",)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
async def test_no_trick_makes_an_operator_of_anybody(door: Callable[[Gateway], Any]) -> None:
    rest = Rest()
    application = gateway(with_tokens(), rest)
    host = "Host: localhost"
    requests = []
    for method, path in ROUTES:
        requests += [asked(method, target, host) for target in target_tricks(path)]
        requests += [asked(each, path, host) for each in method_tricks(method)]
        requests += [asked(method, path, host, *headers) for headers in header_tricks(method)]
        requests += [asked("GET", path, host, f"X-HTTP-Method-Override: {method}")]
        requests += [asked(method, path, version="1.0"), asked(method, path, host, version="1.0")]
    assert len(requests) > 40 * len(ROUTES)
    async with served(application, door(application)) as server:
        for data in requests:
            status = await status_of(port_of(server), data)
            looks = data.split(b" ", 1)[0].decode() in LOOKING
            assert looks or not 200 <= status < 300, (status, data)
    assert {method for method, _, _ in rest.done} <= LOOKING, rest.done


async def status_of(port: int, data: bytes) -> int:
    """0 where the server ends the connection without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            line = await reader.readline()
    except ConnectionError:
        return 0
    finally:
        writer.close()
    return int(line.split()[1]) if line else 0


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(
    ("authorization", "operator"),
    [
        (f"Bearer {TOKEN}", "alice"),
        (f"bearer  {TOKEN}", "alice"),
        (f"BEARER {OTHER}", "bob"),
    ],
)
async def test_a_token_says_who_calls(
    door: Callable[[Gateway], Any], authorization: str, operator: str
) -> None:
    rest = Rest()
    application = gateway(with_tokens(), rest)
    async with served(application, door(application)) as server:
        headers = ("Host: example.com", f"Authorization: {authorization}", "X-Forwarded-For: x")
        status = await status_of(port_of(server), asked("POST", "/v1/models/m:load", *headers))
    assert (status, rest.done) == (200, [("POST", "/v1/models/m:load", operator)])


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
async def test_everybody_may_look_and_predict(door: Callable[[Gateway], Any]) -> None:
    rest = Rest()
    application = gateway(with_tokens(), rest)
    async with served(application, door(application)) as server:
        for method in LOOKING:
            data = asked(method, "/v1/models/m", "Host: example.com", "Origin: null")
            assert await status_of(port_of(server), data) == 200
        for method, status in (("POST", 200), ("PUT", 405), ("GET", 405)):
            data = asked(method, "/v1/models/m:predict", "Host: example.com")
            assert await status_of(port_of(server), data) == status
    assert {operator for _, _, operator in rest.done} == {None}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("path", ["/v1/models/m/release", "/v1/models/m/rel%65ase%0A"])
async def test_a_release_is_for_operators_to_look_at(
    door: Callable[[Gateway], Any], path: str
) -> None:
    rest = Rest()
    application = gateway(with_tokens(), rest)
    async with served(application, door(application)) as server:
        for method in LOOKING:
            for sent, status in (
                ((), 401),
                ((f"Authorization: Bearer {TOKEN[:-1]}",), 403),
                ((f"Authorization: Bearer {TOKEN}",), 200),
            ):
                data = asked(method, path, "Host: example.com", *sent)
                assert await status_of(port_of(server), data) == status
    assert {operator for _, _, operator in rest.done} == {"alice"}


HOST = (b"host", b"localhost:8000")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], Unauthorized),
        ([(b"authorization", b"")], Unauthorized),
        ([(b"authorization", b"Bearer ")], Unauthorized),
        ([(b"authorization", b"Basic YWxpY2U6eA==")], Unauthorized),
        ([(b"authorization", b"Bearer " + TOKEN.encode()[:-1])], Forbidden),
        ([(b"authorization", b"Bearer " + TOKEN.encode())], "alice"),
        ([(b"authorization", b"Bearer " + TOKEN.encode())] * 2, Forbidden),
    ],
)
def test_nobody_is_told_apart_from_somebody_else(
    fields: list[tuple[bytes, bytes]], expected: Any
) -> None:
    recognised = with_tokens().recognise(headers_of([HOST, *fields]), "127.0.0.1")
    assert recognised == expected or isinstance(recognised, RequestError)
    assert isinstance(recognised, str) or type(recognised) is expected


ALLOWED = {
    "as curl asks": ("127.0.0.1", [HOST]),
    "by IPv6": ("::1", [(b"host", b"[::1]:8000")]),
    "on a socket of both kinds": ("::ffff:127.0.0.1", [(b"host", b"127.0.0.1")]),
    "by another address of the machine": ("127.0.0.2", [(b"host", b"127.9.9.9:1")]),
    "in capitals": ("127.0.0.1", [(b"host", b"LOCALHOST:8000")]),
    "from its own documentation": (
        "127.0.0.1",
        [HOST, (b"origin", b"http://localhost:8000")],
    ),
}
REFUSED = {
    "from outside": ("192.0.2.7", [HOST]),
    "from nowhere": ("", [HOST]),
    "from what looks like it": ("127.0.0.1.example.com", [HOST]),
    "by a proxy": ("127.0.0.1", [HOST, (b"x-forwarded-for", b"127.0.0.1")]),
    "by a proxy of another kind": ("127.0.0.1", [HOST, (b"x-forwarded-host", b"localhost")]),
    "by a proxy that keeps to the standard": ("127.0.0.1", [HOST, (b"forwarded", b"for=::1")]),
    "by a proxy that tells of itself": ("127.0.0.1", [HOST, (b"via", b"1.1 x")]),
    "by nginx": ("127.0.0.1", [HOST, (b"x-real-ip", b"127.0.0.1")]),
    "without a host": ("127.0.0.1", []),
    "to an empty host": ("127.0.0.1", [(b"host", b"")]),
    "to a name that was rebound": ("127.0.0.1", [(b"host", b"evil.example:8000")]),
    "to a name that begins well": ("127.0.0.1", [(b"host", b"localhost.evil.example")]),
    "to an address that begins well": ("127.0.0.1", [(b"host", b"127.0.0.1.evil.example")]),
    "to somebody at this host": ("127.0.0.1", [(b"host", b"evil@localhost")]),
    "to two hosts": ("127.0.0.1", [(b"host", b"evil.example"), HOST]),
    "to all addresses": ("127.0.0.1", [(b"host", b"0.0.0.0:8000")]),
    "to no text": ("127.0.0.1", [(b"host", b"\xff\x00")]),
    "from a page of another site": ("127.0.0.1", [HOST, (b"origin", b"https://evil.example")]),
    "from a page without a site": ("127.0.0.1", [HOST, (b"origin", b"null")]),
    "from a page of another server here": (
        "127.0.0.1",
        [HOST, (b"origin", b"http://localhost:3000")],
    ),
    "from a page with an empty origin": ("127.0.0.1", [HOST, (b"origin", b"")]),
    "from two pages": (
        "127.0.0.1",
        [HOST, (b"origin", b"http://evil.example"), (b"origin", b"http://localhost:8000")],
    ),
}


@pytest.mark.parametrize(("peer", "fields"), ALLOWED.values(), ids=ALLOWED)
def test_without_tokens_whoever_runs_programs_here_is_the_operator(
    peer: str, fields: list[tuple[bytes, bytes]]
) -> None:
    assert this_machine().recognise(headers_of(fields), peer) == "loopback"


@pytest.mark.parametrize(("peer", "fields"), REFUSED.values(), ids=REFUSED)
def test_others_are_not(peer: str, fields: list[tuple[bytes, bytes]]) -> None:
    assert isinstance(this_machine().recognise(headers_of(fields), peer), Forbidden)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_needs_no_token(host: str) -> None:
    operators_of(settings(HOST=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.com", ""])
def test_any_other_address_needs_one_and_both_ways_out_are_named(host: str) -> None:
    if host:
        with pytest.raises(ConfigurationError, match=r"HIKYAKU_OPERATOR_TOKEN.*127\.0\.0\.1"):
            operators_of(settings(HOST=host))
    operators_of(settings(HOST=host, OPERATOR_TOKEN=TOKEN))


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ("only-15-of-chars", None),
        ("only-15-of-char", "line 1: a token has at least 16"),
        (f"{TOKEN}\nalice:{TOKEN[:5]}", "line 2: a token has at least 16"),
        (f"{TOKEN} {TOKEN}", "line 1: a token has letters"),
        (f"al ice:{TOKEN}", "line 1: a name has"),
        (f":{TOKEN}", "line 1: a name has"),
        (f"loopback:{TOKEN}", "line 1: the name loopback"),
        (f"alice:{TOKEN}\nbob:{TOKEN}", "the same token twice"),
        ("\n \n", "no token in it"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_line_that_cannot_be_used_stops_the_start_and_shows_no_token(
    tmp_path: Path, tokens: str, named: str | None, in_file: bool
) -> None:
    file = tmp_path / "tokens"
    file.write_text(tokens)
    given = settings(OPERATOR_TOKEN_FILE=str(file)) if in_file else settings(OPERATOR_TOKEN=tokens)
    if named is None:
        operators_of(given)
        return
    with pytest.raises(ConfigurationError, match=f"HIKYAKU_OPERATOR_TOKEN.*{named}") as refused:
        operators_of(given)
    assert TOKEN[:5] not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"HIKYAKU_OPERATOR_TOKEN_FILE: .*tokens"):
        operators_of(settings(OPERATOR_TOKEN_FILE=str(file)))


async def test_a_token_is_shown_nowhere(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"bob:{OTHER}")
    environment = {
        "HIKYAKU_OPERATOR_TOKEN": f"alice:{TOKEN}",
        "HIKYAKU_OPERATOR_TOKEN_FILE": str(file),
    }
    caplog.set_level(logging.DEBUG)
    said = [repr(load_settings(environment)), str(load_settings(environment))]
    said.append(load_settings(environment).model_dump_json())
    async with serve("binary", environment=environment) as client:
        for token in (TOKEN, OTHER, "wrong-but-long-enough"):
            headers = {"Authorization": f"Bearer {token}"}
            for body in ({"now": "2014-01-01T02:00:00Z"}, {"now": token[:3]}, {}):
                answer = await client.put("/v1/replay-clock", json=body, headers=headers)
                said += [answer.text, str(answer.headers)]
        for path in ("/docs", "/openapi.json", "/metrics", "/v1/models", "/v2/health/ready"):
            said.append((await client.get(path)).text)
    said.append(caplog.text)
    shown = [text for text in said if any(t in text for t in (TOKEN, OTHER, "wrong-but-long"))]
    assert shown == []


async def test_who_is_no_operator_is_told_what_to_send(serve: Serve) -> None:
    async with serve("binary", environment={"HIKYAKU_OPERATOR_TOKEN": TOKEN}) as client:
        nobody = await client.put("/v1/replay-clock", json={"now": "2014-01-01T02:00:00Z"})
        wrong = await client.put("/v1/replay-clock", headers={"Authorization": "Bearer x"})
        right = await client.put(
            "/v1/replay-clock",
            json={"now": "2014-01-01T02:00:00Z"},
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "unauthorized")
    assert nobody.headers["www-authenticate"] == "Bearer"
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "forbidden")
    assert right.status_code == 200


async def test_the_documentation_says_what_needs_a_token(serve: Serve) -> None:
    async with serve("binary") as client:
        schema = (await client.get("/openapi.json")).json()
    scheme = schema["components"]["securitySchemes"]["operator"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    operations = {
        (method, path): operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    guarded = {
        of
        for of, operation in operations.items()
        if operation.get("security") == [{"operator": []}]
        and {"401", "403"} <= operation["responses"].keys()
    }
    open_to_all = {(m, p) for m, p in operations if m == "get" or p.endswith(":predict")}
    assert guarded == operations.keys() - open_to_all
    assert {("put", "/v1/replay-clock"), ("post", "/v1/models/{name}:load")} <= guarded
