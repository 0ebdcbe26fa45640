"""A Redis for labels, and workers that share it."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.topologies import PASSWORD, Server, server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis") / "r", "appendonly yes") as started:
        yield started


@pytest.fixture
def client(running: Server) -> "Iterator[redis.Redis[Any]]":
    with running.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def url(running: Server, client: "redis.Redis[Any]") -> str:
    return f"redis://:{PASSWORD}@127.0.0.1:{running.port}"
