"""How one Redis may be reached: TLS, a unix socket, a user that may do little, a database."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.clock import ReplayClock
from app.config import Settings
from app.deadline import Deadline
from app.errors import FeaturesUnavailable
from app.features.source import FeatureRows, ValueStatus
from app.main import open_features
from tests.tiny_feast import KNOWN_AT, Fleet, driver_key
from tests.topologies import PASSWORD, Server, copy_keys, server

PRESENT, NOT_FOUND = ValueStatus.PRESENT, ValueStatus.NOT_FOUND
UNAVAILABLE = ValueStatus.UNAVAILABLE


@pytest.fixture(scope="module")
def own(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A Redis with the fleet's values in database 0, and its unix socket."""
    folder = tmp_path_factory.mktemp("redis") / "own"
    with (
        server(folder, f"unixsocket {folder}/redis.sock") as started,
        started.client() as client,
    ):
        copy_keys(fleet.redis_url, client)
        yield started, folder / "redis.sock"


async def read(url: str, fleet: Fleet, times: int = 1) -> list[FeatureRows]:
    """What is known of driver 1 in Kyoto, read so many times."""
    async with open_features(Settings(feature_redis_url=url), ReplayClock(KNOWN_AT)) as open_source:
        source = open_source(fleet.plan)
        return [
            await source.fetch({"driver_id": [1], "city": ["kyoto"]}, 1, Deadline.after(5))
            for _ in range(times)
        ]


async def test_a_unix_socket_is_read(fleet: Fleet, own: tuple[Server, Path]) -> None:
    [rows] = await read(f"unix://:{PASSWORD}@{own[1]}", fleet)
    assert rows.status.tolist() == [[PRESENT] * 6]


async def test_a_database_is_read_by_its_number(fleet: Fleet, own: tuple[Server, Path]) -> None:
    at = f":{PASSWORD}@127.0.0.1:{own[0].port}"
    with own[0].client() as client:
        client.copy(driver_key(1), driver_key(1), destination_db=3)
    [stored] = await read(f"redis://{at}/3", fleet)
    [nothing] = await read(f"redis://{at}/4", fleet)
    assert stored.status.tolist() == [[PRESENT] * 3 + [NOT_FOUND] * 3]
    assert (nothing.status == NOT_FOUND).all()
    [same] = await read(f"unix://:{PASSWORD}@{own[1]}?db=3", fleet)
    assert same.status.tolist() == stored.status.tolist()


async def test_a_user_needs_to_read_hashes_and_nothing_else(
    fleet: Fleet, own: tuple[Server, Path]
) -> None:
    with own[0].client() as client:
        client.execute_command("ACL SETUSER", "reader", "on", ">p@ss", "~*", "+hmget", "+hgetall")
    [rows] = await read(f"redis://reader:p%40ss@127.0.0.1:{own[0].port}", fleet)
    assert rows.status.tolist() == [[PRESENT] * 6]


async def test_a_key_that_the_user_may_not_read_harms_no_other(
    fleet: Fleet, own: tuple[Server, Path]
) -> None:
    with own[0].client() as client:
        client.execute_command("ACL SETUSER", "partly", "on", ">p", "~*driver_id*", "+hmget")
    url = f"redis://partly:p@127.0.0.1:{own[0].port}"
    first, second = await read(url, fleet, times=2)
    city = fleet.plan.references.index("city:demand")
    assert first.status[0, city] == UNAVAILABLE
    assert (first.status == PRESENT).sum() == 5
    assert second.status.tolist() == first.status.tolist()


async def test_a_wrong_password_is_told(fleet: Fleet, own: tuple[Server, Path]) -> None:
    with pytest.raises(FeaturesUnavailable, match="WRONGPASS"):
        await read(f"redis://:wrong@127.0.0.1:{own[0].port}", fleet)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for localhost that signs itself, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", "key.pem", "-out", "certificate.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return both


@asynccontextmanager
async def behind_tls(url: str, certificate: Path) -> AsyncIterator[str]:
    """Takes TLS off in front of a Redis; yields the URL that speaks it."""
    inside = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    copies: set[asyncio.Task[Any]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_connection(inside.hostname, inside.port)
        copies.add(asyncio.create_task(copy(reader, redis_writer)))
        copies.add(asyncio.create_task(copy(redis_reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        yield f"rediss://:{inside.password}@localhost:{port}/0"
        await asyncio.gather(*copies, return_exceptions=True)


async def test_tls_is_spoken_with_whom_ssl_cert_file_vouches_for(
    fleet: Fleet, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "certificate.pem"))
    async with behind_tls(fleet.redis_url, certificate) as url:
        [rows] = await read(url, fleet)
    assert rows.status.tolist() == [[PRESENT] * 6]


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    fleet: Fleet, certificate: Path
) -> None:
    async with behind_tls(fleet.redis_url, certificate) as url:
        with pytest.raises(FeaturesUnavailable, match="certificate"):
            await read(url, fleet)


async def test_a_certificate_of_another_host_is_refused(
    fleet: Fleet, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "certificate.pem"))
    async with behind_tls(fleet.redis_url, certificate) as url:
        with pytest.raises(FeaturesUnavailable, match="certificate"):
            await read(url.replace("localhost", "127.0.0.1"), fleet)


async def test_a_connection_that_answers_too_much_at_its_start_is_made_anew(
    fleet: Fleet, own: tuple[Server, Path]
) -> None:
    """One reply more than was asked for: nobody can tell any more whose the next one is."""
    made = 0
    relays: list[asyncio.Task[Any]] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        task = asyncio.current_task()
        assert task is not None
        relays.append(task)
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", own[0].port)
        surplus = b":0\r\n" if made == 1 else b""
        with closing(writer), closing(to_redis), suppress(ConnectionError):
            for number in range(1000):  # a question and its answer, in turns
                question = await reader.read(65536)
                if not question:
                    break
                to_redis.write(question)
                writer.write(await from_redis.read(65536) + (surplus if number == 0 else b""))
        await asyncio.gather(writer.wait_closed(), to_redis.wait_closed(), return_exceptions=True)

    async with await asyncio.start_server(relay, "127.0.0.1") as listener:
        port = listener.sockets[0].getsockname()[1]
        url = f"redis://:{PASSWORD}@127.0.0.1:{port}"
        settings = Settings(feature_redis_url=url)
        async with open_features(settings, ReplayClock(KNOWN_AT)) as open_source:
            source = open_source(fleet.plan)
            async with asyncio.timeout(5):
                while True:
                    try:
                        rows = await source.fetch(
                            {"driver_id": [1], "city": ["kyoto"]}, 1, Deadline.after(5)
                        )
                        break
                    except FeaturesUnavailable:
                        await asyncio.sleep(0.01)
        await asyncio.gather(*relays)
    assert rows.status.tolist() == [[PRESENT] * 6]
    assert made == 2
