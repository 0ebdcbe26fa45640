"""The Redis of the state that replicas share: what must hold before anything is kept in it."""

from app.errors import ConfigurationError
from app.features.redis_address import RedisAddress, parse_address
from app.features.redis_connection import ConnectionLost, Reply, ask, command, connect, give_up

_SETTING = "STATE_REDIS_URL"


async def check_state_store(url: str) -> None:
    """Raises `ConfigurationError` unless the Redis answers, never evicts and persists.

    Release state that Redis may drop is worse than none: a replica would believe that nothing was
    ever released. A Redis that forbids CONFIG (managed ones do) is taken at its word.
    """
    address = parse_address(url, _SETTING)
    if not isinstance(address, RedisAddress):
        raise ConfigurationError(f"{_SETTING}: one Redis, without Sentinels and no cluster")
    names = ("maxmemory-policy", "appendonly", "save")
    try:
        connection = await connect(address, give_up)
        try:
            replies = await ask(
                connection, *(command(b"CONFIG", b"GET", name.encode()) for name in names)
            )
        finally:
            connection.close("it has been checked")
    except ConnectionLost as exc:
        raise ConfigurationError(f"{_SETTING}: cannot be used: {exc}") from exc
    policy, append_only, save = map(_value, replies)
    if policy not in {"noeviction", None}:
        raise ConfigurationError(f"{_SETTING}: maxmemory-policy is {policy}, not noeviction")
    if append_only == "no" and save == "":
        raise ConfigurationError(f"{_SETTING}: neither appendonly nor save is set")


def _value(reply: Reply) -> str | None:
    """Of `CONFIG GET name`; None where that is not allowed."""
    return reply[1].decode() if isinstance(reply, list) and len(reply) == 2 else None
