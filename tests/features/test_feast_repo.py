"""The Feast repository: its settings, its address, and what was pushed and joined."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import redis

from app.errors import ConfigurationError, HikyakuError
from tests.features.pushed_repository import Pushed
from tests.tiny_feast import FLEET, KNOWN_AT, SETTINGS, Fleet


@pytest.fixture(autouse=True)
def _feast(fleet: Fleet) -> None:
    """Whoever imports Feast first gets its warnings: let it be the fixture."""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://store:6380", "store:6380"),
        ("redis://store", "store:6379"),
        ("redis://store/", "store:6379"),
        ("redis://store/3", "store:6379,db=3"),
        ("redis://:secret@store:6380/0", 'store:6380,password="secret"'),
        (
            "redis://reader:secret@store",
            'store:6379,username="reader",password="secret"',
        ),
        ("redis://:12345@store", 'store:6379,password="12345"'),
        ("redis://:true@store", 'store:6379,password="true"'),
        ("redis://:a%3Db%40c%2Fd@store", 'store:6379,password="a=b@c/d"'),
        ("rediss://store", "store:6379,ssl=true"),
        ("rediss://:secret@store/1", 'store:6379,password="secret",db=1,ssl=true'),
        (
            "unix://:secret@/tmp/r.sock?db=3",
            ':0,unix_socket_path="/tmp/r.sock",password="secret",db=3',
        ),
        (
            "redis+cluster://reader:secret@a,b:7001",
            'a:6379,b:7001,username="reader",password="secret"',
        ),
        ("redis+sentinel://a,b:27000/flights/2", "a:26379,b:27000,db=2"),
        (
            "redis+sentinel://:secret@a/flights?sentinel_password=its%3Down",
            'a:26379,sentinel_kwargs={"password": "its=own"},password="secret"',
        ),
        ("rediss+sentinel://a/flights", 'a:26379,sentinel_kwargs={"ssl": true},ssl=true'),
    ],
)
def test_an_address_is_said_in_feasts_form(url: str, expected: str) -> None:
    from app.features.feast_repo import connection_string

    assert connection_string(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "store:6379",
        "http://store:6379",
        "unix:///tmp/a,b.sock",
        "redis://",
        "redis://:6379",
        "redis://:a,b@store",
        "redis://:a%2Cb@store",
        "redis://a%2Cb:secret@store",
        "redis://store:port",
        "redis://store:99999",
        "redis://store/one",
        "redis://store/1/2",
        "redis://[::1]:6379",
        "redis://store?db=3",
        "redis+cluster://a,[::1]",
        "rediss+sentinel://a/flights?sentinel_password=secret",
    ],
)
def test_an_address_that_feast_cannot_take_is_refused_by_the_name_of_its_setting(url: str) -> None:
    from app.features.feast_repo import connection_string

    with pytest.raises(ConfigurationError, match="FEATURE_REDIS_URL"):
        connection_string(url)


@pytest.mark.parametrize(
    ("url", "redis_type"),
    [
        ("redis://store", "redis"),
        ("redis+cluster://store", "redis_cluster"),
        ("redis+sentinel://store/flights", "redis_sentinel"),
    ],
)
def test_feast_is_told_what_kind_of_redis_it_is(fleet: Fleet, url: str, redis_type: str) -> None:
    from app.features.feast_repo import open_store

    online_store = open_store(fleet.repo, url).config.online_store
    assert online_store.redis_type == redis_type
    if redis_type == "redis_sentinel":
        assert online_store.sentinel_master == "flights"


def test_a_password_is_never_part_of_a_refusal() -> None:
    from app.features.feast_repo import connection_string

    with pytest.raises(ConfigurationError) as refusal:
        connection_string("redis://:s3,cret@store")
    assert "cret" not in str(refusal.value)


def test_a_folder_without_settings_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    from app.features.feast_repo import open_store

    with pytest.raises(ConfigurationError, match=r"feature_store\.yaml.*HIKYAKU_FEATURE_REPO"):
        open_store(tmp_path, None)


def test_a_redis_for_a_repository_with_another_online_store_is_refused(tmp_path: Path) -> None:
    from app.features.feast_repo import open_store

    settings = SETTINGS.replace("type: redis", "type: sqlite").replace(
        'connection_string: "127.0.0.1:1"', "path: online.db"
    )
    (tmp_path / "feature_store.yaml").write_text(settings)
    with pytest.raises(ConfigurationError, match="'sqlite'"):
        open_store(tmp_path, "redis://store")


def test_loading_again_stores_nothing(pushed: Pushed) -> None:
    views = ["driver", "city"]
    with redis.Redis.from_url(pushed.redis_url) as client:
        client.flushall()
    assert load(pushed, views=views) == {"driver": 5, "city": 3}
    before = pushed.dump()
    assert load(pushed, views=views) == {"driver": 0, "city": 0}
    assert pushed.dump() == before


def test_each_view_is_said_before_it_is_loaded(pushed: Pushed) -> None:
    from app.features.feast_repo import materialize, open_writer

    told: list[str] = []
    store = open_writer(pushed.repo, pushed.redis_url)
    loads = materialize(store, KNOWN_AT, views=["city", "driver"], say=told.append)
    assert next(loads).view == "city"
    assert told == ["city"]
    assert [load.view for load in loads] == ["driver"]


def test_a_load_may_begin_late_or_where_the_last_one_ended(pushed: Pushed) -> None:
    with redis.Redis.from_url(pushed.redis_url) as client:
        client.flushall()
    late = KNOWN_AT + timedelta(seconds=1)
    assert load(pushed, views=["city"], since=late, until=late) == {"city": 0}
    assert load(pushed, views=["city"], since="last", until=late) == {"city": 0}
    assert load(pushed, views=["city"], since=KNOWN_AT, until=late) == {"city": 3}


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("citty", r"no feature view 'citty' in the registry: \['city'"),
        ("kept_offline", "feature view 'kept_offline' has no online data"),
    ],
)
def test_a_view_that_cannot_be_loaded_is_refused_before_any_is(
    pushed: Pushed, view: str, message: str
) -> None:
    before = pushed.dump()
    with pytest.raises(ConfigurationError, match=message):
        load(pushed, views=["driver_in_city", view])
    assert pushed.dump() == before


def test_a_view_whose_history_lacks_its_features_is_named(pushed: Pushed) -> None:
    with pytest.raises(HikyakuError, match="measured: cannot be loaded: "):
        load(pushed, views=["measured"])


def load(
    pushed: Pushed,
    *,
    views: list[str],
    since: datetime | Literal["last"] | None = None,
    until: datetime = KNOWN_AT,
) -> dict[str, int | None]:
    """The rows that were stored, by view."""
    from app.features.feast_repo import materialize, open_writer

    store = open_writer(pushed.repo, pushed.redis_url)
    loads = materialize(store, until, since=since, views=views)
    return {load.view: load.stored_rows for load in loads}


def test_the_working_directory_is_as_it_was_after_an_apply(fleet: Fleet) -> None:
    from app.features.feast_repo import apply

    before = Path.cwd()
    apply(fleet.repo, fleet.redis_url)
    assert Path.cwd() == before


def test_the_join_keeps_the_order_of_rows_over_months_and_does_not_change_what_was_asked(
    fleet: Fleet,
) -> None:
    from app.features.feast_repo import point_in_time

    later = KNOWN_AT + timedelta(days=45)
    asked = pd.DataFrame(
        {
            "driver_id": [1, 2, 1, 0],
            "city": ["kyoto", "東京", "nowhere", ""],
            "asked_at": [later, KNOWN_AT, KNOWN_AT, later],
        },
        index=[7, 7, 3, 1],
    )
    before = asked.copy(deep=True)
    told: list[str] = []
    joined = point_in_time(fleet.open_store(), "fleet", asked, "asked_at", told.append)
    assert list(joined) == list(FLEET.references)
    assert joined["city:demand"].tolist()[:2] == [2.0, 8.0]
    assert joined["city:demand"].tolist()[3] == 0.25
    assert pd.isna(joined["driver:trips"]).tolist() == [True, False, False, True]
    assert joined["driver:plate"].tolist() == [None, None, "品川 11", None]
    assert told == ["2013-06: 2 rows", "2013-07: 2 rows"]
    pd.testing.assert_frame_equal(asked, before)


def test_the_join_knows_nothing_before_it_became_known(fleet: Fleet) -> None:
    from app.features.feast_repo import point_in_time

    asked = pd.DataFrame(
        {
            "driver_id": [1, 1],
            "city": ["kyoto", "kyoto"],
            "asked_at": [KNOWN_AT - timedelta(seconds=1), KNOWN_AT],
        }
    )
    joined = point_in_time(fleet.open_store(), "fleet", asked, "asked_at")
    assert pd.isna(joined["city:demand"]).tolist() == [True, False]
    assert pd.isna(joined["driver:trips"]).tolist() == [True, False]


def test_what_serves_needs_no_library_of_the_offline_store(tmp_path: Path) -> None:
    from app.features.feast_repo import open_store

    (tmp_path / "feature_store.yaml").write_text(
        "project: test\nprovider: local\nregistry: registry.db\n"
        "offline_store: {type: a_library_that_is_not_installed.Store}\n"
        'online_store: {type: redis, connection_string: "store:6379"}\n'
        "entity_key_serialization_version: 3\n"
    )
    assert open_store(tmp_path, None, online_only=True).project == "test"
    with pytest.raises(Exception, match="a_library_that_is_not_installed"):
        _ = open_store(tmp_path, None).config.offline_store
