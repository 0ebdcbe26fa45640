"""Feature reads beside the Feast SDK and beside bare hiredis: one process, one loop, one Redis.

    make bench-features      (BENCH="--rounds 5 --entities 10000 --json FILE")

Two views of 32 Float32 features, each of one entity; every read asks for other entities, and each
of them has an event time of its own. The contenders take turns within each round, in an order that
is reversed from round to round. Figures are medians of the rounds, and only their ratios are worth
comparing between machines. The CPU of groups is that of this process alone, sockets and all.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import pandas as pd
import uvloop

from app.clock import WallClock
from app.deadline import Deadline
from app.features.redis_address import parse_address
from app.features.redis_features import RedisFeatures
from app.features.redis_hash import entity_hashes
from app.features.redis_source import RedisSource
from app.local.redis_server import own_redis

FEATURES = 32
CONCURRENT = 64
GROUPS = (1, 16, 64)
"""Rows that one read asks for: what arrives in one turn of the event loop is read together."""
ROWS = 1000
SEED = 20131231

DEFINITIONS = f"""
FEATURES = {FEATURES}
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64

views = []
for name in ("driver", "customer"):
    key = name + "_id"
    entity = Entity(name=name, join_keys=[key], value_type=ValueType.INT64)
    views.append(FeatureView(
        name=name + "_stats", entities=[entity], ttl=timedelta(days=1),
        schema=[Field(name=key, dtype=Int64)]
        + [Field(name="f" + str(i), dtype=Float32) for i in range(FEATURES)],
        source=FileSource(name=name, path="data/none.parquet", timestamp_field="at"),
    ))
    globals()[name] = entity
driver_view, customer_view = views
service = FeatureService(name="both", features=views)
"""

SETTINGS = """
project: bench
provider: local
registry: data/registry.db
online_store: {type: redis, connection_string: "127.0.0.1:1"}
entity_key_serialization_version: 3
"""


class BareConnection(asyncio.Protocol):
    """The floor: hiredis on the loop's protocol, one reader, no plan, no decoding."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._replies: list[Any] = []
        self._wanted = 0
        self._answer: asyncio.Future[list[Any]] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, commands: bytes, wanted: int) -> "asyncio.Future[list[Any]]":
        self._wanted, self._replies = wanted, []
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(commands)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._replies.append(reply)
        if len(self._replies) == self._wanted and self._answer is not None:
            self._answer.set_result(self._replies)


class Contest:
    """Everything that reads, on one Redis, and the entities that are asked for."""

    def __init__(
        self, store: Any, source: RedisSource, bare: BareConnection, entities: int
    ) -> None:
        self._store = store
        self._service = store.get_feature_service("both")
        self._source = source
        self._bare = bare
        self._hashes = entity_hashes(source.plan)
        self._random = random.Random(SEED)
        self._entities = entities

    def ids(self, rows: int) -> dict[str, list[int]]:
        return {
            "driver_id": [self._random.randrange(self._entities) for _ in range(rows)],
            "customer_id": [self._random.randrange(self._entities) for _ in range(rows)],
        }

    async def ours(self, ids: dict[str, list[int]]) -> None:
        await self._source.fetch(ids, len(ids["driver_id"]), Deadline.after(60))

    async def sdk_async(self, ids: dict[str, list[int]]) -> None:
        await self._store.get_online_features_async(self._service, ids, full_feature_names=True)

    async def sdk(self, ids: dict[str, list[int]]) -> None:
        self._store.get_online_features(self._service, ids, full_feature_names=True)

    async def hiredis(self, commands: bytes) -> None:
        await self._bare.ask(commands, 2)

    def commands(self, ids: dict[str, list[int]]) -> bytes:
        return b"".join(
            command
            for read in self._hashes
            for command in read.commands(read.entities(ids, 1)[0], read.form())
        )


async def one_by_one(read: Callable[[Any], Awaitable[None]], asked: Sequence[Any]) -> list[float]:
    """Seconds of each read."""
    seconds = []
    for one in asked:
        started_s = time.perf_counter()
        await read(one)
        seconds.append(time.perf_counter() - started_s)
    return seconds


async def together(read: Callable[[Any], Awaitable[None]], asked: Sequence[Any]) -> float:
    """Reads a second, CONCURRENT of them in flight."""
    left = iter(asked)

    async def caller() -> None:
        for one in left:
            await read(one)

    started_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CONCURRENT)))
    return len(asked) / (time.perf_counter() - started_s)


async def round_of(contest: Contest, number: int, reads: int) -> dict[str, float]:
    """Every contender once. Latencies in µs, rates in reads a second."""
    figures: dict[str, float] = {}

    async def sequential(name: str, read: Any, asked: Sequence[Any]) -> None:
        figures[name] = statistics.median(await one_by_one(read, asked)) * 1e6

    async def grouped(rows: int) -> None:
        asked = [contest.ids(rows) for _ in range(reads // rows + 20)]
        started_s = time.process_time()
        await one_by_one(contest.ours, asked)
        used_s = time.process_time() - started_s
        figures[f"ours_groups_of_{rows}_cpu_us_a_row"] = used_s / len(asked) / rows * 1e6

    async def concurrent(name: str, read: Any, asked: Sequence[Any]) -> None:
        figures[name] = await together(read, asked)

    single = [contest.ids(1) for _ in range(reads)]
    prepared = [contest.commands(ids) for ids in single]
    many = [contest.ids(1) for _ in range(reads * 10)]
    wide = [contest.ids(ROWS) for _ in range(20)]
    steps: list[Callable[[], Awaitable[None]]] = [
        lambda: sequential("hiredis_p50_us", contest.hiredis, prepared),
        lambda: sequential("ours_p50_us", contest.ours, single),
        lambda: sequential("sdk_async_p50_us", contest.sdk_async, single[: reads // 4]),
        lambda: concurrent("ours_reads_s", contest.ours, many),
        lambda: concurrent("sdk_async_reads_s", contest.sdk_async, single[: reads // 2]),
        *[partial(grouped, rows) for rows in GROUPS],
        lambda: sequential("ours_1000_us", contest.ours, wide),
        lambda: sequential("sdk_1000_us", contest.sdk, wide[:4]),
        lambda: sequential("sdk_async_1000_us", contest.sdk_async, wide[:4]),
    ]
    for step in steps if number % 2 == 0 else reversed(steps):
        await step()
    return figures


def fill(repo: Path, url: str, entities: int) -> Any:
    """The repository, applied, every entity written through Feast."""
    from app.features.feast_repo import apply, open_store, write

    apply(repo, url)
    store = open_store(repo, url)
    numbers = np.random.default_rng(SEED)
    for name in ("driver", "customer"):
        columns = {f"f{i}": numbers.normal(size=entities).astype(np.float32) for i in range(32)}
        frame = pd.DataFrame({f"{name}_id": np.arange(entities), **columns})
        frame["at"] = datetime.now(UTC) - pd.to_timedelta(
            numbers.integers(40_000, size=entities), "s"
        )
        write(store, f"{name}_stats", frame)
    return store


async def contest(store: Any, url: str, options: argparse.Namespace) -> dict[str, float]:
    from app.features.feast_plan import compile_plan

    async with AsyncExitStack() as stack:
        address = parse_address(url)
        features = await stack.enter_async_context(RedisFeatures(address))
        source = RedisSource(features, compile_plan(store, "both"), WallClock())
        _, bare = await asyncio.get_running_loop().create_connection(
            BareConnection, address.host, address.port
        )
        await bare.ask(f"AUTH {address.password}\r\n".encode(), 1)
        contestants = Contest(store, source, bare, options.entities)
        gc.collect()
        gc.freeze()  # as `hikyaku serve` does: what start-up made is not walked again
        rounds = []
        for number in range(options.rounds + 1):
            figures = await round_of(contestants, number, options.reads)
            if number:  # the first one warms up
                rounds.append(figures)
                print(f"  round {number} of {options.rounds}", file=sys.stderr, flush=True)
        return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def report(figures: dict[str, float]) -> dict[str, float]:
    ratios = {
        f"reads/s at {CONCURRENT} in flight, ours / SDK async (goal ≥ 20)": figures["ours_reads_s"]
        / figures["sdk_async_reads_s"],
        "p50 one by one, ours / bare hiredis (goal ≤ 1.35)": figures["ours_p50_us"]
        / figures["hiredis_p50_us"],
        f"{ROWS} rows, SDK / ours (goal ≥ 12)": figures["sdk_1000_us"] / figures["ours_1000_us"],
    }
    for name, value in {**figures, **ratios}.items():
        print(f"{value:12,.2f}  {name}")
    return {**figures, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", type=int, default=1000, help="sequential reads in a round")
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Feast's, about its own dependencies
    with tempfile.TemporaryDirectory() as folder, own_redis(Path(folder) / "redis") as url:
        repo = Path(folder) / "repo"
        (repo / "data").mkdir(parents=True)
        (repo / "feature_store.yaml").write_text(SETTINGS)
        (repo / "bench_definitions.py").write_text(DEFINITIONS)
        pd.DataFrame({"at": [datetime.now(UTC)]}).to_parquet(repo / "data" / "none.parquet")
        print("writing the features through Feast …", file=sys.stderr, flush=True)
        store = fill(repo, url, options.entities)
        figures = report(uvloop.run(contest(store, url, options)))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    # Feast leaves threads and an open connection behind.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
