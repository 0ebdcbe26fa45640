"""The Redis of the state that replicas share: what must hold before anything is kept in it."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from app.errors import ConfigurationError


async def check_state_store(url: str) -> None:
    """Raises `ConfigurationError` unless the Redis answers, never evicts and persists.

    Release state that Redis may drop is worse than none: a replica would believe that nothing was
    ever released. A Redis that forbids CONFIG (managed ones do) is taken at its word.
    """
    try:
        client = redis.asyncio.from_url(
            url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as exc:
        raise ConfigurationError(f"STATE_REDIS_URL: {exc}") from exc
    try:
        await client.echo("")
        try:
            policy = (await client.config_get("maxmemory-policy"))["maxmemory-policy"]
            append_only = (await client.config_get("appendonly"))["appendonly"]
            save = (await client.config_get("save"))["save"]
        except ResponseError:
            return
    except (RedisError, OSError) as exc:
        raise ConfigurationError(f"STATE_REDIS_URL: cannot be used: {exc}") from exc
    finally:
        await client.aclose()
    if policy != "noeviction":
        raise ConfigurationError(f"STATE_REDIS_URL: maxmemory-policy is {policy}, not noeviction")
    if append_only != "yes" and not save:
        raise ConfigurationError("STATE_REDIS_URL: neither appendonly nor save is set")
