"""`make prove-repository` in small: killed publishers, power cuts, damaged files."""

import shutil
from collections.abc import Iterator

import pytest

from loadtests.forked_publishers import Publishers
from loadtests.prove_repository import (
    MODEL,
    Bench,
    Tally,
    bench,
    killed_in_a_folder,
    prove_damage,
)
from loadtests.sync_order import lost_by_a_power_cut, trace

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")


@pytest.fixture(scope="module")
def things() -> Iterator[Bench]:
    with bench() as made:
        yield made


def test_damaged_and_forged_versions_are_refused_by_the_name_of_a_file(things: Bench) -> None:
    tally = Tally()
    prove_damage(300, 7, things, tally)
    assert tally.failures == []
    assert tally.runs["damaged in the repository"] == 240


@needs_strace
def test_whoever_kills_a_publisher_leaves_the_old_state_or_the_new_one(things: Bench) -> None:
    tally = Tally()
    points = [("later", "write", 3), ("first", "rename", 2), ("beside another", "fsync", 7)]
    with Publishers(killing=True) as forks:
        for variant, call, nth in points:
            assert killed_in_a_folder(forks, forks, things, variant, call, nth, tally)
    assert tally.failures == []


@needs_strace
def test_a_power_cut_loses_nothing_that_a_publisher_has_shown(things: Bench) -> None:
    shutil.rmtree(things.scratch, ignore_errors=True)
    shutil.copytree(things.empty, things.scratch / "models")
    model = str(things.scratch / "models" / MODEL)
    calls = trace(things.publication(model, "signed"), things.scratch / "calls")
    assert list(lost_by_a_power_cut(calls)) == []
    syncs = [place for place, call in enumerate(calls) if " fsync(" in call]
    assert len(syncs) >= 8
    for place in syncs:  # each of them is needed
        assert list(lost_by_a_power_cut(calls[:place] + calls[place + 1 :]))
