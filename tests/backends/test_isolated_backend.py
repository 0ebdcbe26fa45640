"""The isolated backend: its process dies, hangs and leaks alone, and is replaced."""

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvloop

from app.backends import open_backend
from app.backends.backend import Backend, BackendDied
from app.contract import EchoOptions, Isolation
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, InvalidModel, ModelNotReady
from app.tensors import Signature, TensorSpec
from tests.backends.isolated_models import (
    FOR_EVER,
    SOON,
    allocating,
    answer,
    cpu_ticks,
    looping,
    opened,
    processes,
    rows,
    until,
)


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Backend]:
    """Open, of the model `looping`, and stuck after a quarter of a second."""
    isolated = await opened(looping(tmp_path / "model.onnx"), stuck_s=0.25)
    yield isolated
    await isolated.close()


@contextmanager
def beside_a_busy_one(process: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process has the core on which all threads of this one must compute."""
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        os.sched_setaffinity(other.pid, core)
        _pin(process, core)
        yield other
        _pin(process, cores)
        other.kill()


def _pin(process: int, cores: set[int]) -> None:
    for task in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


async def until_it_answers(backend: Backend) -> None:
    while True:
        try:
            assert await answer(backend, 1, 2) == [1, 2]
            return
        except (BackendDied, ModelNotReady):
            await asyncio.sleep(0.01)


async def began(backend: Backend, value: float = FOR_EVER) -> "asyncio.Task[list[float]]":
    """An execution that keeps the process busy."""
    (process,) = processes()
    before = cpu_ticks(process)
    execution = asyncio.create_task(answer(backend, value))
    await until(lambda: cpu_ticks(process) > before + 5)
    return execution


async def raised(execution: Awaitable[object]) -> BaseException:
    (error,) = await asyncio.gather(execution, return_exceptions=True)
    assert isinstance(error, BaseException)
    return error


async def test_an_execution_whose_process_is_killed_is_told_so_and_the_next_is_answered(
    backend: Backend,
) -> None:
    execution = await began(backend)
    os.kill(processes()[0], signal.SIGKILL)
    with pytest.raises(BackendDied, match="killed by SIGKILL"):
        await execution
    assert await answer(backend, 1, 2, 3) == [1, 2, 3]


async def test_a_process_that_is_not_let_compute_is_not_stuck(tmp_path: Path) -> None:
    backend = await opened(looping(tmp_path / "model.onnx"), stuck_s=0.25, nice=19)
    (process,) = processes()
    with beside_a_busy_one(process) as other:
        with pytest.raises(DeadlineExceeded):
            await backend.execute(rows(FOR_EVER), Deadline.after(0.05))
        before = cpu_ticks(other.pid)
        # A second in which the other one has had the core.
        await until(lambda: cpu_ticks(other.pid) > before + 100)
        assert processes() == [process]
    await until(lambda: processes() != [process])
    await backend.close()


async def test_an_execution_that_had_not_begun_is_not_blamed_for_a_death(backend: Backend) -> None:
    poison = await began(backend)
    innocent = [asyncio.create_task(answer(backend, value)) for value in (1, 2, 3)]
    await asyncio.sleep(0)  # one of them is sent ahead now, the others wait
    os.kill(processes()[0], signal.SIGKILL)
    assert isinstance(await raised(poison), BackendDied)
    assert await asyncio.gather(*innocent) == [[1], [2], [3]]


async def test_an_execution_that_a_dead_process_never_got_is_run_by_the_next(
    backend: Backend,
) -> None:
    (process,) = processes()
    os.kill(process, signal.SIGKILL)
    wait_until_it_is_dead(process)  # and the event loop knows nothing of it
    assert await answer(backend, 1, 2) == [1, 2]


async def test_an_execution_of_which_a_process_got_only_a_part_is_run_by_the_next(
    tmp_path: Path,
) -> None:
    specs = (TensorSpec("x", "float64", (-1,)),)
    backend = await open_backend(
        EchoOptions(use="echo", isolated=Isolation()), tmp_path, Signature(specs, specs)
    )
    (process,) = processes()
    os.kill(process, signal.SIGSTOP)
    x = np.random.default_rng(0).random((1, 4_000_000))  # more than the socket takes
    execution = asyncio.create_task(backend.execute({"x": x}, SOON))
    await asyncio.sleep(0)
    os.kill(process, signal.SIGKILL)
    np.testing.assert_array_equal((await execution)["x"], x)
    await backend.close()


async def test_what_a_dying_process_says_last_is_the_reason_and_in_the_log(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    execution = await began(backend)
    with caplog.at_level(logging.WARNING, "app"):
        os.kill(processes()[0], signal.SIGABRT)
        error = await raised(execution)
    assert "killed by SIGABRT" in str(error)
    said = [vars(record)["line"] for record in caplog.records if "line" in vars(record)]
    assert "Fatal Python error: Aborted" in said
    assert said[-1] in str(error)


async def test_between_a_death_and_the_next_process_the_backend_is_not_ready(
    backend: Backend,
) -> None:
    await backend.check()
    execution = await began(backend)
    os.kill(processes()[0], signal.SIGKILL)
    assert isinstance(await raised(execution), BackendDied)
    with pytest.raises(ModelNotReady, match="killed by SIGKILL"):
        await backend.check()
    assert await answer(backend, 1) == [1]
    await backend.check()


async def test_an_execution_whose_deadline_passes_while_a_process_starts_can_be_retried(
    backend: Backend,
) -> None:
    execution = await began(backend)
    os.kill(processes()[0], signal.SIGKILL)
    assert isinstance(await raised(execution), BackendDied)
    with pytest.raises(ModelNotReady, match="killed by SIGKILL"):
        await backend.execute(rows(1), Deadline.after(0.01))


async def test_a_model_that_can_no_longer_be_opened_is_tried_with_pauses_in_which_all_is_refused(
    backend: Backend, tmp_path: Path
) -> None:
    content = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    os.kill(processes()[0], signal.SIGKILL)
    waited = [raised(answer(backend, value)) for value in (1, 2, 3)]
    errors = await asyncio.gather(*waited)
    # The first was sent to the process that was killed; the others waited for the next one.
    assert {type(error) for error in errors[1:]} <= {BackendDied, ModelNotReady}
    with pytest.raises(ModelNotReady, match=r"model\.onnx: ONNX Runtime cannot load it"):
        await answer(backend, 1)
    (tmp_path / "model.onnx").write_bytes(content)
    await until_it_answers(backend)


async def test_a_hanging_execution_ends_at_its_deadline_and_the_next_is_answered(
    backend: Backend,
) -> None:
    (hanging,) = processes()
    with pytest.raises(DeadlineExceeded):
        await backend.execute(rows(FOR_EVER), Deadline.after(0.05))
    assert await answer(backend, 1) == [1]
    assert processes() != [hanging]


async def test_a_cancelled_execution_that_hangs_is_ended(backend: Backend) -> None:
    execution = await began(backend)
    execution.cancel()
    assert isinstance(await raised(execution), asyncio.CancelledError)
    assert await answer(backend, 1) == [1]


async def test_executions_that_are_given_up_but_end_leave_the_process_alone(
    backend: Backend,
) -> None:
    before = processes()
    for _ in range(50):
        execution = asyncio.create_task(answer(backend, 10))
        await asyncio.sleep(0)
        execution.cancel()
    assert await answer(backend, 1) == [1]
    assert processes() == before


async def test_an_execution_that_waits_behind_a_hanging_one_is_answered(backend: Backend) -> None:
    hanging = await began(backend)
    behind = asyncio.create_task(answer(backend, 1))
    await asyncio.sleep(0)
    hanging.cancel()
    assert await behind == [1]


async def test_an_execution_over_the_memory_limit_is_the_rows_fault(tmp_path: Path) -> None:
    backend = await opened(allocating(tmp_path / "model.onnx"))
    before = processes()
    with pytest.raises(BackendError, match=r"(?i)alloc"):
        await answer(backend, FOR_EVER)
    assert await answer(backend, 1) == [1]
    assert processes() == before
    await backend.close()


async def test_a_process_that_has_grown_is_replaced_and_nobody_waits_for_it(
    tmp_path: Path,
) -> None:
    backend = await opened(allocating(tmp_path / "model.onnx"), memory_mb=1024)
    (grown,) = processes()
    assert await answer(backend, 120e6) == [120e6]  # ONNX Runtime keeps the 480 MB
    while grown in processes():
        assert await answer(backend, 1, 2) == [1, 2]
        await backend.check()
        await asyncio.sleep(0.01)
    assert await answer(backend, 3) == [3]
    await backend.close()


async def test_a_replaced_process_is_warmed_as_the_first_was(tmp_path: Path) -> None:
    backend = await opened(allocating(tmp_path / "model.onnx"), stuck_s=0.25)
    times = await backend.warm_up(rows(2), 8)
    assert 0 < times.predicted_s(1) < 10
    (tmp_path / "model.onnx").write_bytes(looping(tmp_path / "other.onnx").read_bytes())
    os.kill(processes()[0], signal.SIGKILL)
    await until_it_answers(backend)
    await backend.close()


@pytest.mark.system
async def test_many_deaths_leave_nothing_behind(tmp_path: Path) -> None:
    backend = await opened(looping(tmp_path / "model.onnx"))

    async def die() -> None:
        os.kill(processes()[0], signal.SIGKILL)
        await until_it_answers(backend)

    for _ in range(3):
        await die()
    descriptors, resident = held()
    for _ in range(9):
        await die()
    after = held()
    assert after[0] == descriptors
    assert after[1] < resident + 4 * 2**20
    assert len(processes()) == 1
    await backend.close()
    assert processes() == []


def wait_until_it_is_dead(process: int) -> None:
    """With all its threads, each of which keeps its sockets open."""
    descriptor = os.pidfd_open(process)
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


def held() -> tuple[int, int]:
    """Open descriptors, and resident bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


async def test_closing_ends_a_process_that_hangs_too(backend: Backend) -> None:
    execution = await began(backend)
    execution.cancel()
    await backend.close()
    assert processes() == []


async def test_closing_does_not_wait_for_what_nobody_waits_for(tmp_path: Path) -> None:
    backend = await opened(looping(tmp_path / "model.onnx"), stuck_s=3600)
    execution = await began(backend)
    execution.cancel()
    async with asyncio.timeout(20):
        await backend.close()
    assert processes() == []


async def test_a_process_that_dies_often_is_started_with_pauses_though_it_answers(
    tmp_path: Path,
) -> None:
    backend = await opened(looping(tmp_path / "model.onnx"), proven_s=3600)
    for _ in range(4):
        await until_it_answers(backend)
        os.kill(processes()[0], signal.SIGKILL)
        await until(lambda: not processes())
    # Until the server has seen it, too.
    while isinstance(error := await raised(answer(backend, 1)), BackendDied):
        pass
    assert isinstance(error, ModelNotReady)
    await backend.close()


async def test_what_cannot_be_opened_is_invalid_for_the_reason_of_the_backend_inside(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InvalidModel, match=r"model\.onnx: ONNX Runtime cannot load it"):
        await opened(tmp_path / "model.onnx")
    assert processes() == []


async def test_a_process_that_is_not_open_in_time_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"model\.onnx: was not open and warm within 0\.05 s"):
        await opened(looping(tmp_path / "model.onnx"), start_s=0.05)
    assert processes() == []


async def test_a_process_that_dies_while_it_opens_makes_the_model_invalid(tmp_path: Path) -> None:
    opening = asyncio.create_task(opened(looping(tmp_path / "model.onnx")))
    await until(lambda: len(processes()) == 1)
    os.kill(processes()[0], signal.SIGSEGV)
    with pytest.raises(InvalidModel, match=r"the process that opened it ended: it was killed by S"):
        await opening


async def test_texts_and_tensors_larger_than_any_buffer_pass_both_ways(tmp_path: Path) -> None:
    specs = (TensorSpec("t", "str", (1,)), TensorSpec("x", "float64", (-1,)))
    backend = await open_backend(
        EchoOptions(use="echo", isolated=Isolation()), tmp_path, Signature(specs, specs)
    )
    inputs = {
        "t": np.array([["東京"], [""]], object),
        "x": np.random.default_rng(0).random((2, 2_000_000)),
    }
    for outputs in await asyncio.gather(*(backend.execute(inputs, SOON) for _ in range(4))):
        assert outputs["t"].tolist() == [["東京"], [""]]
        np.testing.assert_array_equal(outputs["x"], inputs["x"])
    await backend.close()


async def test_a_model_that_answers_otherwise_than_it_says_is_told_and_lives(
    tmp_path: Path,
) -> None:
    signature = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (1,)),))
    backend = await open_backend(EchoOptions(use="echo", isolated=Isolation()), tmp_path, signature)
    before = processes()
    with pytest.raises(BackendError, match=r"'y' is float32\[3, 2\] instead of float32\[3, 1\]"):
        await backend.execute({"x": np.ones((3, 2), np.float32)}, SOON)
    assert processes() == before
    await backend.close()


@pytest.mark.parametrize(("texts", "length"), [(200_000, 0), (1, 16 << 20)])
async def test_texts_that_would_hold_up_the_server_are_refused(
    tmp_path: Path, texts: int, length: int
) -> None:
    specs = (TensorSpec("t", "str", (-1,)),)
    backend = await open_backend(
        EchoOptions(use="echo", isolated=Isolation()), tmp_path, Signature(specs, specs)
    )
    with pytest.raises(BackendError, match="texts for 1 rows"):
        await backend.execute({"t": np.array([["x" * length] * texts], object)}, SOON)
    await backend.close()


async def test_a_tensor_that_cannot_be_sent_is_the_rows_fault(backend: Backend) -> None:
    with pytest.raises(BackendError, match="complex"):
        await backend.execute({"x": np.ones((1, 1), np.complex64)}, SOON)
    assert await answer(backend, 1) == [1]


def test_it_is_supervised_in_uvloop_too(tmp_path: Path) -> None:
    async def die_and_answer() -> None:
        backend = await opened(looping(tmp_path / "model.onnx"), stuck_s=0.25)
        execution = await began(backend)
        os.kill(processes()[0], signal.SIGKILL)
        assert isinstance(await raised(execution), BackendDied)
        assert await answer(backend, 1) == [1]
        with pytest.raises(DeadlineExceeded):
            await backend.execute(rows(FOR_EVER), Deadline.after(0.05))
        assert await answer(backend, 2) == [2]
        await backend.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(die_and_answer())


SERVER = """
import asyncio, sys
from pathlib import Path
from tests.backends.isolated_models import FOR_EVER, answer, opened, processes

async def serve():
    backend = await opened(Path(sys.argv[1]))
    execution = asyncio.create_task(answer(backend, FOR_EVER))
    await asyncio.sleep(0)
    print(*processes(), flush=True)
    await execution

asyncio.run(serve())
"""


def test_a_server_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    model = looping(tmp_path / "model.onnx")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(model)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        left = Path(f"/proc/{int(server.stdout.readline())}")
        assert left.exists()
        server.kill()
    give_up_s = time.monotonic() + 30
    while left.exists() and "Z" not in (left / "stat").read_text().split()[2]:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
