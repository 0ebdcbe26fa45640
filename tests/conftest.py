"""What several folders of tests share: one Feast repository on one Redis for the whole run."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import hypothesis
import pytest

from loadtests.triton_process import TritonProcess
from tests.tiny_feast import Fleet, materialize_fleet, running_fleet
from tests.tiny_models import onnx_model
from tests.topologies import Server, Watched, cluster, cluster_url, sentinel_url, watched

# A busy machine must not fail a property, nor a run leave files behind.
hypothesis.settings.register_profile("tests", deadline=None, database=None)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first: begun last, they keep one process busy while others idle."""
    slow = {item.path for item in items if item.get_closest_marker("system") is not None}
    items.sort(key=lambda item: (item.path.parent.name != "system", item.path not in slow))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Takes ten seconds and more: ask for it only where Feast itself is the subject."""
    environment = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Feast about its own dependencies
        import feast  # noqa: F401  (here, so that those who use it later are not warned)
    # Importing Feast turns prometheus_client's multiprocess mode on, for every child process too.
    os.environ.clear()
    os.environ.update(environment)
    with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture(scope="session")
def cluster_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three masters. A test that moves slots leaves all of them held by one."""
    with cluster(tmp_path_factory.mktemp("cluster"), masters=3) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two Redis and three sentinels. A test may make them fail over, but leaves all of them up."""
    with watched(tmp_path_factory.mktemp("sentinels"), sentinels=3) as started:
        yield started


@pytest.fixture(scope="session")
def fleet_in_cluster(fleet: Fleet, cluster_nodes: list[Server]) -> Fleet:
    """The fleet's values, written to a cluster by Feast."""
    return materialize_fleet(replace(fleet, redis_url=cluster_url(cluster_nodes)))


@pytest.fixture(scope="session")
def fleet_behind_sentinels(fleet: Fleet, sentinels: Watched) -> Fleet:
    """The fleet's values, written by Feast to the master that sentinels name."""
    return materialize_fleet(replace(fleet, redis_url=sentinel_url(sentinels.sentinels)))


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """A real Triton with the tiny model `regression`. A test may put others into it and stop it,
    but leaves it running with this one."""
    process = TritonProcess(tmp_path_factory.mktemp("triton"))
    process.put("regression", onnx_model("regression").SerializeToString())
    with process:
        yield process
