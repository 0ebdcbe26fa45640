"""Where the features' Redis is: one server, the master that sentinels name, or a cluster."""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from app.errors import ConfigurationError

REDIS_PORT = 6379
SENTINEL_PORT = 26379

_FORMS = (
    "redis[s]://[user:password@]host[:port][/db], unix://[user:password@]/path[?db=N], "
    "redis[s]+sentinel://[user:password@]host[:port],…/master-name[/db][?sentinel_password=…] or "
    "redis[s]+cluster://[user:password@]host[:port],…"
)


@dataclass(frozen=True)
class RedisAddress:
    """One Redis and who asks it. `unix_path` set: a unix socket, else host and port."""

    host: str
    port: int
    unix_path: str | None
    tls: ssl.SSLContext | None = field(repr=False)
    """How to speak TLS with it. Made once, since reading the authorities takes up to 100 ms."""
    username: str | None
    password: str | None = field(repr=False)
    db: int
    is_master: bool = False
    """Whether it is to be refused when it is no master any more."""

    def __str__(self) -> str:
        return self.unix_path or f"{self.host}:{self.port}"

    async def find(self) -> "RedisAddress":
        """Itself: it does not move."""
        return self


@dataclass(frozen=True)
class SentinelAddress:
    """The sentinels, and how to speak with the master that they call `name`."""

    sentinels: tuple[RedisAddress, ...]
    name: str
    master: RedisAddress
    """Its host and port are not known yet."""


@dataclass(frozen=True)
class ClusterAddress:
    """A few nodes, of which any can name the others. All are spoken to in the same way."""

    nodes: tuple[RedisAddress, ...]


Address: TypeAlias = RedisAddress | SentinelAddress | ClusterAddress


def parse_address(url: str, setting: str = "FEATURE_REDIS_URL") -> Address:
    """Where this setting leads; README lists its forms. Raises `ConfigurationError`, without the
    password, for anything else."""
    try:
        parts = urlsplit(url)
        parse = _PARSERS.get(parts.scheme)
        if parse is None or parts.fragment:
            raise ValueError
        return parse(parts)
    except ValueError:
        # None: urllib's fault may show what it could not read.
        raise ConfigurationError(f"{setting}: must be {_FORMS}") from None


def _server(parts: SplitResult) -> RedisAddress:
    if parts.query:
        raise ValueError
    [(host, port)] = _hosts(parts, REDIS_PORT)
    return _spoken_to(parts, host, port, int(parts.path.strip("/") or 0))


def _unix_socket(parts: SplitResult) -> RedisAddress:
    if not parts.path:
        raise ValueError
    db = int(parts.query.removeprefix("db=") or 0)
    return replace(_spoken_to(parts, "", 0, db), unix_path=unquote(parts.path))


def _sentinels(parts: SplitResult) -> SentinelAddress:
    name, _, db = parts.path.removeprefix("/").partition("/")
    option, _, password = parts.query.partition("=")
    if not name or option not in {"", "sentinel_password"} or "&" in password:
        raise ValueError
    master = replace(_spoken_to(parts, "", 0, int(db or 0)), is_master=True)
    sentinel = replace(
        master, username=None, password=unquote(password) or None, db=0, is_master=False
    )
    hosts = _hosts(parts, SENTINEL_PORT)
    return SentinelAddress(
        tuple(replace(sentinel, host=host, port=port) for host, port in hosts),
        unquote(name),
        master,
    )


def _cluster(parts: SplitResult) -> ClusterAddress:
    if parts.query or parts.path not in {"", "/", "/0"}:  # a cluster has one database
        raise ValueError
    node = _spoken_to(parts, "", 0, 0)
    hosts = _hosts(parts, REDIS_PORT)
    return ClusterAddress(tuple(replace(node, host=host, port=port) for host, port in hosts))


_PARSERS: Mapping[str, Callable[[SplitResult], Address]] = {
    "unix": _unix_socket,
    **dict.fromkeys(("redis", "rediss"), _server),
    **dict.fromkeys(("redis+sentinel", "rediss+sentinel"), _sentinels),
    **dict.fromkeys(("redis+cluster", "rediss+cluster"), _cluster),
}


def _hosts(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """Of `user:password@host:port,host`, what follows the @."""
    each = [urlsplit("//" + item) for item in parts.netloc.rpartition("@")[2].split(",")]
    hosts = [(item.hostname or "", item.port or default_port) for item in each]
    if not all(host for host, _ in hosts):
        raise ValueError
    return hosts


def _spoken_to(parts: SplitResult, host: str, port: int, db: int) -> RedisAddress:
    return RedisAddress(
        host,
        port,
        None,
        ssl.create_default_context() if parts.scheme.startswith("rediss") else None,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        db,
    )
