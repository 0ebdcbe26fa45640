"""What a server uses is that of all its processes, and none of them outlives it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from app.local.processes import child
from loadtests.bench.process_tree import ProcessTree

BUSY_S = 0.3

# A parent whose child has a session of its own; both wait when the work is done. `{work}` is run by
# the child; `{ends}` says whether the child leaves before the parent says that it is done.
FAMILY = """
import os, sys, time
ready, done = os.pipe()
if os.fork() == 0:
    os.setsid()
    until_s = time.process_time() + {busy_s}
    while time.process_time() < until_s:
        pass
    os.write(done, b"x")
    if {ends}:
        os._exit(0)
    time.sleep(600)
os.read(ready, 1)
if {ends}:
    os.wait()
print("done", flush=True)
time.sleep(600)
"""


@contextmanager
def family(*, ends: bool) -> Iterator[tuple["subprocess.Popen[bytes]", ProcessTree]]:
    """A process whose child has used BUSY_S of processor."""
    program = FAMILY.format(busy_s=BUSY_S, ends=ends)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    tree = ProcessTree(process.pid)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        yield process, tree
    finally:
        tree.kill(tree.members())
        process.communicate()


def test_the_processor_time_of_a_child_counts() -> None:
    with family(ends=False) as (_, tree):
        assert len(tree.members()) == 2
        assert tree.cpu_s() >= BUSY_S * 0.9


def test_the_processor_time_of_a_child_that_ended_counts() -> None:
    with family(ends=True) as (_, tree):
        assert len(tree.members()) == 1
        assert tree.cpu_s() >= BUSY_S * 0.9


def test_memory_is_that_of_all_processes() -> None:
    with family(ends=True) as (_, alone), family(ends=False) as (_, both):
        assert 0 < alone.resident_mib() < both.resident_mib()


def test_a_child_that_left_is_ended_after_its_parent_has_gone() -> None:
    with family(ends=False) as (process, tree):
        members = tree.members()
        process.kill()
        process.wait()
        tree.kill(members)
        # The child holds the other end: the output ends when it does.
        output, _ = process.communicate(timeout=10)
        assert output == b""


def test_others_are_not_of_the_family() -> None:
    with child(["sleep", "600"]) as process:
        members = ProcessTree(process.pid).members()
        assert [member.pid for member in members] == [process.pid]
