"""What the tests of pushing share: one repository with push sources for the whole run."""

import itertools
from collections.abc import Iterator

import pytest

from app.local.redis_server import own_redis
from tests.features.pushed_repository import DEFINITIONS_OF_PUSHED, Pushed
from tests.tiny_feast import Fleet, write_repository

_driver_ids = itertools.count(1000)


@pytest.fixture(scope="session")
def pushed(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    from app.features.feast_repo import apply

    folder = tmp_path_factory.mktemp("pushed")
    repo = write_repository(folder / "repo", DEFINITIONS_OF_PUSHED, "pushed_definitions")
    with own_redis(folder / "redis") as redis_url:
        apply(repo, redis_url)
        yield Pushed(repo, redis_url)


@pytest.fixture
def driver_id() -> int:
    """An entity that no other test writes."""
    return next(_driver_ids)
