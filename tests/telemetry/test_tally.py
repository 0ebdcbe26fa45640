"""What workers count on shared memory, each as a `Tallies` of its own on the same file."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.telemetry.tally import Tallies

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("tallies")
    yield descriptor
    os.close(descriptor)


def seen(tallies: Tallies, family: str) -> dict[tuple[str, ...], list[list[float]]]:
    everyones = tallies.everyones(family, 1, 2)
    return {labels: [list(cells) for cells in of] for labels, of in everyones.items()}


def test_every_worker_reads_what_each_has_counted(file: int) -> None:
    one, two = (Tallies.shared(file, place, workers=2) for place in range(2))
    one.ours("requests", ["a"], 2)[0] = 3
    two.ours("requests", ["a"], 2)[1] = 4
    two.ours("requests", ["b"], 2)[0] = 5
    for reader in (one, two):
        assert seen(reader, "requests") == {("a",): [[3, 0], [0, 4]], ("b",): [[5, 0]]}
        assert seen(reader, "others") == {}


def test_who_takes_the_place_of_another_goes_on_with_its_numbers(file: int) -> None:
    Tallies.shared(file, 1, workers=2).ours("requests", ["a"], 2)[0] = 3
    next_ = Tallies.shared(file, 1, workers=2)
    inherited = next_.inherited("requests", 1, 2)
    assert {labels: list(cells) for labels, cells in inherited.items()} == {("a",): [3, 0]}
    next_.ours("requests", ["a"], 2)[0] += 1
    assert seen(Tallies.shared(file, 0, workers=2), "requests") == {("a",): [[4, 0]]}


def test_entries_of_another_form_are_kept_apart(file: int) -> None:
    tallies = Tallies.shared(file, 0, workers=1)
    tallies.ours("requests", ["a"], 2)
    tallies.ours("requests", ["a"], 3)
    tallies.ours("requests", ["a", "b"], 2)
    assert seen(tallies, "requests") == {("a",): [[0, 0]]}


def test_labels_may_hold_anything(file: int) -> None:
    one, two = (Tallies.shared(file, place, workers=2) for place in range(2))
    labels = ['"', "\\", "\n", "飛脚", "", "x" * 1000]
    for label in labels:
        one.ours("requests", [label], 2)
    assert list(seen(two, "requests")) == [(label,) for label in labels]


def test_more_than_fits_is_refused(file: int) -> None:
    tallies = Tallies.shared(file, 0, workers=2)
    with pytest.raises(MemoryError, match="no room for"):
        tallies.ours("requests", ["a"], 2**21)
    tallies.ours("requests", ["a"], 2)[0] = 1
    assert seen(Tallies.shared(file, 1, workers=2), "requests") == {("a",): [[1, 0]]}


KILLED = """
import itertools, sys
from app.telemetry.tally import Tallies
tallies = Tallies.shared(int(sys.argv[1]), 0, 2)
for number in itertools.count():
    cells = tallies.ours("requests", [str(number)], 2)
    cells[1] = cells[0] = number + 1
    if number == 100:
        print("counting", flush=True)
"""


@pytest.mark.system
def test_a_worker_killed_while_it_writes_leaves_whole_entries(file: int) -> None:
    reader = Tallies.shared(file, 1, workers=2)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(file)],
            cwd=ROOT,
            pass_fds=[file],
            stdout=subprocess.PIPE,
        )
        with writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while writer.poll() is None:
                numbers = seen(reader, "requests")
                if len(numbers) > 300:
                    writer.send_signal(signal.SIGKILL)
                    break
        numbers = seen(reader, "requests")
        assert [labels for labels in numbers] == [(str(n),) for n in range(len(numbers))]
        for (label,), (cells,) in list(numbers.items())[:-1]:
            assert cells == [int(label) + 1] * 2
    Tallies.shared(file, 0, workers=2).ours("requests", ["after"], 2)[0] = 1
    assert seen(reader, "requests")["after",] == [[1, 0]]
