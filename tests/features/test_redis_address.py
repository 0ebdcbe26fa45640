"""Where FEATURE_REDIS_URL leads, and that its password stays its own."""

import pytest

from app.errors import ConfigurationError
from app.features.redis_address import (
    ClusterAddress,
    RedisAddress,
    SentinelAddress,
    parse_address,
)


def test_an_address_names_host_port_user_and_database() -> None:
    assert parse_address("redis://reader:a%40b@store:1/2") == RedisAddress(
        "store", 1, None, None, "reader", "a@b", 2
    )
    assert parse_address("redis://store") == RedisAddress("store", 6379, None, None, None, None, 0)


def test_a_unix_socket_is_a_path() -> None:
    assert parse_address("unix://:secret@/run/redis.sock?db=3") == RedisAddress(
        "", 0, "/run/redis.sock", None, None, "secret", 3
    )
    assert parse_address("unix:///run/a%20b%23%3F/100%25%40") == RedisAddress(
        "", 0, "/run/a b#?/100%@", None, None, None, 0
    )


def test_sentinels_have_a_password_of_their_own() -> None:
    address = parse_address(
        "redis+sentinel://reader:p@a:1,[::1]/flights/2?sentinel_password=its%26own"
    )
    assert address == SentinelAddress(
        (
            RedisAddress("a", 1, None, None, None, "its&own", 0),
            RedisAddress("::1", 26379, None, None, None, "its&own", 0),
        ),
        "flights",
        RedisAddress("", 0, None, None, "reader", "p", 2, is_master=True),
    )


def test_all_nodes_of_a_cluster_are_spoken_to_in_one_way() -> None:
    assert parse_address("redis+cluster://reader:p@a:1,b/") == ClusterAddress(
        (
            RedisAddress("a", 1, None, None, "reader", "p", 0),
            RedisAddress("b", 6379, None, None, "reader", "p", 0),
        )
    )


@pytest.mark.parametrize("url", ["rediss://h", "rediss+sentinel://h/m", "rediss+cluster://h"])
def test_tls_is_asked_for_by_the_scheme(url: str) -> None:
    match parse_address(url):
        case RedisAddress() as address:
            assert address.tls is not None
        case SentinelAddress(sentinels=(sentinel,), master=master):
            assert sentinel.tls is not None
            assert master.tls is not None
        case ClusterAddress(nodes=(node,)):
            assert node.tls is not None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "h:6379",
        "redis://",
        "redis://:secret@h:port",
        "redis://:secret@h/one",
        "redis://:secret@h?db=1",
        "redis://:sec#ret@h",
        "redis://:[secret@h",
        "redis://:secret@h,i",
        "unix://:secret@/path?db=x",
        "unix://:secret@",
        "redis+sentinel://:secret@h",
        "redis+sentinel://:secret@h/",
        "redis+sentinel://:secret@h,/m",
        "redis+sentinel://:secret@h/m/one",
        "redis+sentinel://h/m?password=secret",
        "redis+sentinel://h/m?sentinel_password=secret&db=1",
        "redis+cluster://:secret@h/1",
        "redis+cluster://:secret@h?db=1",
        "redis+cluster://:secret@h:1:2",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="FEATURE_REDIS_URL") as refusal:
        parse_address(url)
    assert "secret" not in str(refusal.value)
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:secret@host:1/2",
        "redis+sentinel://user:secret@host/m?sentinel_password=secret",
        "redis+cluster://user:secret@host",
    ],
)
def test_an_address_does_not_show_its_password(url: str) -> None:
    assert "secret" not in repr(parse_address(url))
