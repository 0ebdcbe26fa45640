"""Real topologies of Redis, small and quick: a cluster, and a master that sentinels watch."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from app.local.processes import child
from app.local.redis_server import redis_binary

PASSWORD = "a-secret"
NODE_TIMEOUT_MS = 500
"""After which nodes and sentinels take a silent Redis for dead."""


@dataclass(frozen=True)
class Server:
    """One redis-server or sentinel."""

    port: int
    process: "subprocess.Popen[bytes]"

    def client(self) -> "redis.Redis[Any]":
        return redis.Redis(port=self.port, password=PASSWORD)


@contextmanager
def server(folder: Path, *settings: str, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """A Redis on loopback with PASSWORD and these further settings."""
    port = _free_port()
    folder.mkdir(parents=True)
    lines = [f"port {port}", f'dir "{folder}"', "bind 127.0.0.1", f"requirepass {PASSWORD}"]
    config = folder / "redis.conf"
    config.write_text("\n".join([*lines, *settings, ""]))
    with (folder / "log").open("w") as output, ExitStack() as stack:
        process = stack.enter_context(
            child([str(redis_binary()), str(config), *arguments], output=output, patience_s=2)
        )
        started = Server(port, process)
        with started.client() as client:
            until(lambda: _answers(client))
        yield started


@contextmanager
def cluster(folder: Path, masters: int, replicas: int = 0) -> Iterator[list[Server]]:
    """Masters that share all slots evenly, then replicas of the first masters."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                server(
                    folder / str(number),
                    "cluster-enabled yes",
                    f"cluster-node-timeout {NODE_TIMEOUT_MS}",
                    "cluster-replica-validity-factor 0",
                    "repl-diskless-sync-delay 0",
                    f"masterauth {PASSWORD}",
                    'save ""',
                )
            )
            for number in range(masters + replicas)
        ]
        clients = [stack.enter_context(node.client()) for node in nodes]
        bounds = [16384 * number // masters for number in range(masters + 1)]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number < masters:
                slots = range(bounds[number], bounds[number + 1])
                client.execute_command("CLUSTER ADDSLOTS", *slots)
            for other in nodes[:number]:
                client.execute_command("CLUSTER MEET", "127.0.0.1", other.port)
        until(lambda: all(_met(client) == len(nodes) for client in clients))
        for number, client in enumerate(clients[masters:]):
            client.execute_command("CLUSTER REPLICATE", node_id(clients[number]))
            until(lambda client=client: client.info()["master_link_status"] == "up")
        until(lambda: all(_cluster_state(client) == "ok" for client in clients))
        yield nodes


def cluster_url(nodes: Sequence[Server]) -> str:
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return f"redis+cluster://:{PASSWORD}@{hosts}"


@dataclass(frozen=True)
class Watched:
    """A master, its replica, and the sentinels that watch them under the name `fleet`."""

    master: Server
    replica: Server
    sentinels: Sequence[Server]


@contextmanager
def watched(folder: Path, sentinels: int) -> Iterator[Watched]:
    with ExitStack() as stack:
        both = ("repl-diskless-sync yes", "repl-diskless-sync-delay 0", f"masterauth {PASSWORD}")
        master = stack.enter_context(server(folder / "master", *both, 'save ""'))
        replica = stack.enter_context(
            server(folder / "replica", *both, 'save ""', f"replicaof 127.0.0.1 {master.port}")
        )
        with replica.client() as client:
            until(lambda: client.info()["master_link_status"] == "up")
        watching = [
            stack.enter_context(sentinel(folder / str(number), master, sentinels // 2 + 1))
            for number in range(sentinels)
        ]
        for each in watching:
            with each.client() as client:
                until(lambda client=client: _knows(client, sentinels))
        yield Watched(master, replica, watching)


@contextmanager
def sentinel(folder: Path, master: Server, quorum: int = 1) -> Iterator[Server]:
    """Watches a master under the name `fleet`."""
    settings = [
        f"sentinel monitor fleet 127.0.0.1 {master.port} {quorum}",
        f"sentinel auth-pass fleet {PASSWORD}",
        f"sentinel sentinel-pass {PASSWORD}",
        f"sentinel down-after-milliseconds fleet {NODE_TIMEOUT_MS}",
        "sentinel failover-timeout fleet 2000",
    ]
    with server(folder, *settings, arguments=["--sentinel"]) as started:
        yield started


def sentinel_url(sentinels: Sequence[Server]) -> str:
    hosts = ",".join(f"127.0.0.1:{each.port}" for each in sentinels)
    return f"redis+sentinel://:{PASSWORD}@{hosts}/fleet?sentinel_password={PASSWORD}"


def node_id(client: "redis.Redis[Any]") -> str:
    return str(client.execute_command("CLUSTER MYID").decode())


def copy_keys(redis_url: str, target: "redis.Redis[Any] | redis.RedisCluster[Any]") -> None:
    """Every key of one Redis into another, or a cluster."""
    with redis.Redis.from_url(redis_url) as source:
        for key in source.scan_iter():
            target.restore(key, 0, source.dump(key), replace=True)


def until(holds: Callable[[], object], limit_s: float = 15) -> None:
    """Wait until it holds."""
    give_up_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < give_up_s, "this does not come to hold"
        time.sleep(0.02)


def _answers(client: "redis.Redis[Any]") -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.BusyLoadingError):
        return False


def _met(client: "redis.Redis[Any]") -> int:
    """How many nodes of its cluster it knows, itself included."""
    nodes = client.execute_command("CLUSTER NODES").values()
    return sum("handshake" not in node["flags"] for node in nodes)


def _cluster_state(client: "redis.Redis[Any]") -> str:
    return str(client.execute_command("CLUSTER INFO")["cluster_state"])


def _knows(client: "redis.Redis[Any]", sentinels: int) -> bool:
    state = client.sentinel_masters()["fleet"]
    return state["num-slaves"] == 1 and state["num-other-sentinels"] == sentinels - 1


def _free_port() -> int:
    """Below 55536: a node of a cluster listens 10000 above it too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55536:
            return port
