"""What an isolated process cannot do, seen from inside and from outside."""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.backends.backend import Backend
from tests.backends.isolated_models import answer, looping, opened, processes

CONFINED = """
import os, socket, sys
from app.backends.isolated_confinement import confine
print(confine(os.getppid(), memory_bytes=300 << 20, nice=3) if sys.argv[1] == "confined" else [])
try:
    {action}
    print("done")
except OSError as exc:
    print(type(exc).__name__)
except MemoryError:
    print("MemoryError")
"""


def says(action: str, *arguments: str) -> list[str]:
    """What a Python program says of trying `action`."""
    finished = subprocess.run(
        [sys.executable, "-c", CONFINED.replace("{action}", action), *arguments],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return finished.stdout.split()


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Backend]:
    isolated = await opened(looping(tmp_path / "model.onnx"), nice=4)
    yield isolated
    await isolated.close()


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("socket.create_connection(('127.0.0.1', int(sys.argv[2])))", "PermissionError"),
        ("os.execv(sys.executable, [sys.executable, '-c', 'print()'])", "PermissionError"),
        ("bytearray(400 << 20)", "MemoryError"),
        ("os.write(os.open(sys.argv[3], os.O_RDWR), b'x')", "OSError"),
    ],
    ids=["network", "programs", "memory", "files"],
)
def test_a_confined_process_cannot_do_what_another_can(
    tmp_path: Path, action: str, error: str
) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = (str(listener.getsockname()[1]), str(tmp_path / "file"))
        assert says(action, "confined", *arguments) == ["[]", error]
        assert says(action, "free", *arguments)[-1:] in (["done"], ["[]"])


def test_a_process_whose_server_has_ended_does_not_begin() -> None:
    program = (
        "from app.backends.isolated_confinement import confine\n"
        "confine(1, memory_bytes=1 << 30, nice=0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "the server has ended" in finished.stderr


async def test_the_process_sees_nothing_of_the_environment(backend: Backend) -> None:
    (process,) = processes()
    assert environment(process) <= {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH"}


def environment(process: int) -> set[str]:
    """The names of its variables."""
    content = Path(f"/proc/{process}/environ").read_bytes()
    return {entry.split(b"=")[0].decode() for entry in content.split(b"\0") if entry}


async def test_the_process_is_confined_while_it_serves(backend: Backend) -> None:
    assert await answer(backend, 1) == [1]
    (process,) = processes()
    here = Path(f"/proc/{process}")
    assert os.readlink(here / "ns" / "net") != os.readlink("/proc/self/ns/net")
    status = dict(line.split(":\t") for line in (here / "status").read_text().splitlines())
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    limits = (here / "limits").read_text().splitlines()
    assert {line.split("  ")[0]: line[26:].split()[:2] for line in limits}.items() >= {
        "Max data size": [str(1 << 30)] * 2,
        "Max core file size": ["0"] * 2,
        "Max file size": ["0"] * 2,
    }.items()
    assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0) + 4
    assert os.getsid(process) == process
    assert os.readlink(here / "fd" / "0") == "/dev/null"
    # Those of its event loop aside it has the socket and the pipe that its server gave it.
    files = {os.readlink(fd) for fd in (here / "fd").iterdir()}
    assert not {name for name in files if name.startswith("/")} - {"/dev/null"}
