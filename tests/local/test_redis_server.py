"""The Redis of our own: who may ask it, what it refuses, what it leaves behind."""

import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.errors import ConfigurationError
from app.local.redis_server import own_redis

pytestmark = pytest.mark.system

ONCE = Retry(NoBackoff(), 0)


def test_it_answers_with_its_password(tmp_path: Path) -> None:
    with own_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.ping()


@pytest.mark.parametrize("password", [None, "", "wrong"])
def test_it_answers_nobody_without_its_password(tmp_path: Path, password: str | None) -> None:
    with own_redis(tmp_path) as url:
        port = urlsplit(url).port or 0
        with (
            redis.Redis(host="127.0.0.1", port=port, password=password, retry=ONCE) as client,
            pytest.raises(redis.RedisError),
        ):
            client.ping()


def test_each_has_a_password_of_its_own(tmp_path: Path) -> None:
    with own_redis(tmp_path / "a") as first, own_redis(tmp_path / "b") as second:
        assert urlsplit(first).password != urlsplit(second).password
        assert urlsplit(first).port != urlsplit(second).port


def test_it_listens_on_loopback_only(tmp_path: Path) -> None:
    with own_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


@pytest.mark.parametrize("command", [("EVAL", "return 1", "0"), ("SCRIPT", "LOAD", "return 1")])
def test_it_runs_no_scripts(tmp_path: Path, command: tuple[str, ...]) -> None:
    with (
        own_redis(tmp_path) as url,
        redis.Redis.from_url(url) as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


def test_it_never_evicts_and_persists_as_the_state_store_demands(tmp_path: Path) -> None:
    with own_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("save")["save"]


def test_its_password_is_for_its_owners_eyes(tmp_path: Path) -> None:
    with own_redis(tmp_path):
        assert stat.S_IMODE((tmp_path / "redis.conf").stat().st_mode) == 0o600


def test_it_is_gone_after_leaving(tmp_path: Path) -> None:
    with own_redis(tmp_path) as url:
        pass
    with redis.Redis.from_url(url, retry=ONCE) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    assert not (tmp_path / "redis.conf").exists()


def test_it_is_gone_when_what_used_it_failed(tmp_path: Path) -> None:
    urls = []

    def use() -> None:
        with own_redis(tmp_path) as url:
            urls.append(url)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        use()
    with redis.Redis.from_url(urls[0], retry=ONCE) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_it_keeps_its_data_over_a_restart_in_the_same_folder(tmp_path: Path) -> None:
    with own_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.set("driver", "1")
    with own_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.get("driver") == b"1"


def test_a_redis_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "dump.rdb").write_bytes(b"this is no Redis file")
    with (
        pytest.raises(
            ConfigurationError, match=r"Redis did not start: .*Fatal error loading the DB"
        ),
        own_redis(tmp_path),
    ):
        pass
    assert not (tmp_path / "redis.conf").exists()
