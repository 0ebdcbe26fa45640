"""How redis-py's clients, which find out where a Redis is, are to behave."""

from typing import Any

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from app.features.redis_address import RedisAddress

_ANSWER_S = 0.5


def options(address: RedisAddress) -> dict[str, Any]:
    """Of a client for this Redis, besides its host and port.

    It gives an answer half a second (redis-py would try for many), and a connection that has ended
    since the last question one other.
    """
    return {
        "username": address.username,
        "password": address.password,
        "ssl": address.tls is not None,
        "socket_timeout": _ANSWER_S,
        "socket_connect_timeout": _ANSWER_S,
        "retry": Retry(NoBackoff(), 1, (ConnectionError,)),
    }
