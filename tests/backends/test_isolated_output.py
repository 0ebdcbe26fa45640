"""What an isolated process writes becomes lines of the log, however much it writes."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator

import pytest

from app.backends.isolated_output import ForwardedOutput


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    yield reads, writes
    os.close(writes)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record).get("line", record.getMessage()) for record in caplog.records]


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  (the pipe is read when the loop gets to it)
        await asyncio.sleep(0)


async def test_lines_are_logged_with_the_model_and_the_process(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    output = ForwardedOutput(pipe[0], "model.onnx", 42)
    os.write(pipe[1], b"first\n\n  second \nwithout an end")
    await until(lambda: len(lines(caplog)) == 2)
    output.close()
    assert lines(caplog) == ["first", "second"]
    assert output.last_line == "second"
    assert {(vars(r)["model"], vars(r)["pid"]) for r in caplog.records} == {("model.onnx", 42)}


async def test_what_is_written_last_is_logged_when_it_is_closed(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    output = ForwardedOutput(pipe[0], "model.onnx", 42)
    os.write(pipe[1], b"the reason\n")
    output.close()
    assert lines(caplog) == ["the reason"]


async def test_a_flood_is_cut(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    output = ForwardedOutput(pipe[0], "model.onnx", 42)
    os.write(pipe[1], b"x" * 10_000 + b"\n" + b"y\n" * 1_000)
    with caplog.at_level(logging.WARNING):
        await until(lambda: output.last_line == "y")
    output.close()
    assert len(caplog.records) <= 2 * 61  # of two minutes, where the second began meanwhile
    assert max(map(len, lines(caplog))) <= 500
