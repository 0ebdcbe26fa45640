"""The comparison itself, on a real registry that is applied twice."""

import asyncio
from collections.abc import Mapping
from typing import TypeAlias

import pytest

from app.features.plan import FeaturePlan
from app.features.registry_watch import RegistryWatch
from app.telemetry.metrics import Metrics
from tests.tiny_feast import DEFINITIONS, TTL_S, Fleet, write_repository

pytestmark = pytest.mark.system

BEFORE = (
    DEFINITIONS
    + """
cities = FeatureService(name="cities", features=[city])
drivers = FeatureService(name="drivers", features=[driver])
visits = FeatureService(name="visits", features=[driver_in_city[["visits"]]])
"""
)
AFTER = (
    BEFORE.replace(f"{TTL_S}),\n              rating", f"{2 * TTL_S}),\n              rating")
    .replace('driver_in_city[["visits"]]', "driver_in_city")
    .replace('name="fleet"', 'name="renamed"')
)

Found: TypeAlias = tuple[Mapping[str, str], Mapping[str, str]]


@pytest.fixture(scope="module")
def found(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is outdated right after publishing, and after the definitions have changed."""
    from app.features.feast_plan import compile_plan
    from app.features.feast_repo import apply, open_store

    repo = write_repository(tmp_path_factory.mktemp("watched") / "repo", BEFORE, "before")
    apply(repo, fleet.redis_url)
    store = open_store(repo, None)
    plans: dict[str, FeaturePlan] = {
        f"model of {service}": compile_plan(store, service)
        for service in ("fleet", "cities", "drivers", "visits")
    }
    watch = RegistryWatch(repo, 300, lambda: plans, Metrics())
    asyncio.run(watch.check())
    assert watch.state == "done"
    published = watch.outdated
    (repo / "before.py").rename(repo / "after.py")
    (repo / "after.py").write_text(AFTER)
    apply(repo, fleet.redis_url)
    asyncio.run(watch.check())
    assert watch.state == "done"
    return published, watch.outdated


def test_a_registry_that_was_just_published_from_matches(found: Found) -> None:
    assert found[0] == {}


def test_what_did_not_change_is_not_outdated(found: Found) -> None:
    assert "model of cities" not in found[1]


def test_a_ttl_that_changed_is_named(found: Found) -> None:
    assert (
        found[1]["model of drivers"] == f"view driver: ttl_s was {float(TTL_S)}, is {2.0 * TTL_S}"
    )


def test_a_feature_that_was_added_is_named(found: Found) -> None:
    assert found[1]["model of visits"] == "view driver_in_city: feature known is new"


def test_a_service_that_was_removed_is_named(found: Found) -> None:
    assert "no feature service 'fleet'" in found[1]["model of fleet"]
