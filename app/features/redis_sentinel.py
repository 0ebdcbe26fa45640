"""Follows the master that sentinels name: redis-py finds it, our own connection reads it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import RedisError

from app.features.redis_address import RedisAddress, SentinelAddress
from app.features.redis_connection import ConnectionLost
from app.features.redis_features import RedisFeatures
from app.features.redis_py import options
from app.tasks import ended

log = logging.getLogger(__name__)

_State: TypeAlias = dict[str, Any]
"""What a sentinel says of one master."""

_ASK_EVERY_S = 0.5


@asynccontextmanager
async def master_features(address: SentinelAddress) -> AsyncIterator[RedisFeatures]:
    """The features of a master that may move.

    Whoever connects asks the sentinels first. Twice a second they are asked again: an old master
    that stays up would else be read for ever, since it answers as ever.
    """
    sentinels = Sentinels(address)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sentinels.aclose)
        features = await stack.enter_async_context(RedisFeatures(sentinels))
        watch = asyncio.create_task(_watch(sentinels, features), name="watch the master")
        stack.push_async_callback(ended, watch)
        yield features


class Sentinels:
    """Asked where the master is."""

    def __init__(self, address: SentinelAddress) -> None:
        self._address = address
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis-py's
            [(sentinel.host, sentinel.port) for sentinel in address.sentinels],
            sentinel_kwargs=options(address.sentinels[0]),
        )
        self._asked: set[asyncio.Task[_State | str]] = set()

    async def find(self) -> RedisAddress:
        """The master of the latest failover that most sentinels know of; where most do not answer,
        of those that do. Raises `ConnectionLost` when none names a master that is up."""
        # Nobody is cancelled: what a redis-py connection is worth after that is not sure.
        asked = [asyncio.create_task(self._ask(client)) for client in self._sentinel.sentinels]
        for task in asked:
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        masters: list[_State] = []
        reasons: list[str] = []
        for answer in asyncio.as_completed(asked):
            state = await answer
            if isinstance(state, str):
                reasons.append(state)
            else:
                masters.append(state)
            if len(masters) > len(asked) // 2:
                break
        if not masters:
            raise ConnectionLost(f"no sentinel names a master: {', '.join(reasons) or 'no answer'}")
        latest = max(masters, key=lambda state: int(state["config-epoch"]))
        return replace(self._address.master, host=str(latest["ip"]), port=int(latest["port"]))

    async def _ask(self, client: Redis) -> "_State | str":
        """What this one says of the master; else what is wrong."""
        name = self._address.name
        try:
            masters = await client.sentinel_masters()  # type: ignore[no-untyped-call]  # redis-py's
        except (RedisError, OSError) as exc:
            return str(exc)
        state: _State | None = masters.get(name)
        if state is None:
            return f"{name} is not known"
        return state if self._sentinel.check_master_state(state, name) else f"{name} is down"

    async def aclose(self) -> None:
        """Hear those out that are being asked, which takes a second at most."""
        if self._asked:
            await asyncio.wait(self._asked)
        for client in self._sentinel.sentinels:
            await client.aclose()


async def _watch(sentinels: Sentinels, features: RedisFeatures) -> None:
    while True:
        await asyncio.sleep(_ASK_EVERY_S)
        try:
            features.follow(await sentinels.find())
        except ConnectionLost:
            pass  # sentinels that are down say nothing of the Redis that they watch
        except Exception:  # the watch must survive
            log.exception("the sentinels were not understood")
