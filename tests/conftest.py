"""What several folders of tests share: one Feast repository on one Redis for the whole run."""

import os
import warnings
from collections.abc import Iterator

import hypothesis
import pytest

from tests.tiny_feast import Fleet, running_fleet

# A busy machine must not fail a property, nor a run leave files behind.
hypothesis.settings.register_profile("tests", deadline=None, database=None)
hypothesis.settings.load_profile("tests")


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
