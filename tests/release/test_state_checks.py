from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.errors import ConfigurationError
from app.local.redis_server import own_redis
from app.release.redis_line import check_state_store


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with own_redis(tmp_path) as url:
        yield url


def configure(url: str, **settings: str) -> None:
    with redis.Redis.from_url(url) as client:
        for name, value in settings.items():
            client.config_set(name.replace("_", "-"), value)


async def test_a_redis_that_keeps_what_it_is_given_is_accepted(url: str) -> None:
    await check_state_store(url)
    configure(url, save="", appendonly="yes")
    await check_state_store(url)
    configure(url, appendonly="no")  # while it writes its first one, Redis does not stop


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
        ({"save": "", "appendonly": "no"}, "neither appendonly nor save"),
    ],
)
async def test_one_that_may_forget_is_refused(
    url: str, settings: dict[str, str], named: str
) -> None:
    configure(url, **settings)
    with pytest.raises(ConfigurationError, match=named):
        await check_state_store(url)


@pytest.mark.parametrize("wrong", ["password", "port", "scheme"])
async def test_an_address_that_leads_nowhere_is_one_sentence(url: str, wrong: str) -> None:
    with redis.Redis.from_url(url) as client:
        password, port = (client.get_connection_kwargs()[name] for name in ("password", "port"))
    given = {
        "password": url.replace(password, "guess"),
        "port": url.replace(f":{port}", ":1"),
        "scheme": url.replace("redis://", "http://"),
    }[wrong]
    with pytest.raises(ConfigurationError, match="STATE_REDIS_URL"):
        await check_state_store(given)
