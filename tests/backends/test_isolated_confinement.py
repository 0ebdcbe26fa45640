"""What an isolated process cannot do, seen from inside and from outside."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.backends.backend import Backend
from tests.backends.isolated_models import answer, looping, opened, processes, until

HEX = set("0123456789abcdef")
CONFINED = """
import ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading, time
from app.backends.isolated_confinement import confine

def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

other = os.getppid()
parent, ours = os.pipe()
if sys.argv[1] == "threads":  # a process with two enters no namespace
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
confined = sys.argv[1] != "free"
print(confine(other, memory_bytes=300 << 20) if confined else [])
sys.stdout.flush()
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
        ("os.kill(other, 0)", "PermissionError"),
        ("signal.pidfd_send_signal(os.pidfd_open(other), 0)", "PermissionError"),
        ("call({'x86_64': 234}.get(os.uname().machine, 131), other, other, 0)", "PermissionError"),
        ("resource.prlimit(other, resource.RLIMIT_CORE)", "PermissionError"),
        ("os.setpriority(os.PRIO_PROCESS, other, os.getpriority(0, other))", "PermissionError"),
        ("fcntl.fcntl(parent, 8, other)", "PermissionError"),
        ("fcntl.fcntl(parent, 10, signal.SIGKILL)", "PermissionError"),
    ],
    ids=[
        *("network", "programs", "memory", "files", "kill", "pidfd", "tgkill", "limits"),
        *("priority", "owner of a file", "signal of a file"),
    ],
)
def test_a_confined_process_cannot_do_what_another_can(
    tmp_path: Path, action: str, error: str
) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = (str(listener.getsockname()[1]), str(tmp_path / "file"))
        assert says(action, "confined", *arguments) == ["[]", error]
        assert says(action, "free", *arguments)[-1:] in (["done"], ["[]"])


def test_a_confined_process_cannot_kill_its_parent() -> None:
    program = CONFINED.replace("{action}", "os.kill(other, signal.SIGKILL)")
    server = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    finished = subprocess.run(
        [sys.executable, "-c", server, program, "confined"],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout.split()) == (0, ["[]", "PermissionError"])


@pytest.mark.parametrize(
    "action",
    [
        "signal.raise_signal(signal.SIGUSR1)",
        "call({'x86_64': 234}.get(os.uname().machine, 131), os.getpid(), os.getpid(), 0)",
        "resource.prlimit(0, resource.RLIMIT_CORE)",
        "fcntl.fcntl(parent, fcntl.F_GETFL)",
    ],
    ids=["raise", "tgkill", "limits", "flags of a file"],
)
def test_a_confined_process_can_still_do_to_itself_what_it_needs(action: str) -> None:
    ignoring = f"signal.signal(signal.SIGUSR1, signal.SIG_IGN); {action}"
    assert says(ignoring, "confined") == ["[]", "done"]


def test_a_confined_process_has_no_capabilities() -> None:
    shown = "print(*(line.split()[1] for line in open('/proc/self/status') if line[:3] == 'Cap'))"
    for how in ("confined", "threads"):
        sets = [word for word in says(shown, how) if len(word) == 16 and set(word) <= HEX]
        assert set(sets[:3]) == {"0" * 16}, how  # inheritable, permitted, effective


def test_a_refused_namespace_is_told_with_what_is_lost() -> None:
    """Though the filter holds: the network stays shut, what /proc shows of the server does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = says(
            "socket.create_connection(('127.0.0.1', int(sys.argv[2])))",
            "threads",
            str(listener.getsockname()[1]),
        )
    assert said[-1] == "PermissionError"
    assert "/proc" in said
    assert " ".join(said).count("no namespaces of its own") == 1


def test_a_process_whose_server_has_ended_does_not_begin() -> None:
    program = (
        "from app.backends.isolated_confinement import confine\nconfine(1, memory_bytes=1 << 30)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "the server has ended" in finished.stderr


async def test_the_process_sees_nothing_of_the_environment(backend: Backend) -> None:
    (process,) = processes()
    gpus = {name for name in environment(process) if name.startswith(("CUDA_", "NVIDIA_"))}
    needed = {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH"}
    assert environment(process) - gpus <= needed


async def test_the_process_is_told_which_gpus_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"}
    for name in {*told, "NVIDIA_API_KEY"}:
        monkeypatch.setenv(name, "0")
    isolated = await opened(looping(tmp_path / "model.onnx"))
    (process,) = processes()
    assert environment(process) >= told
    assert "NVIDIA_API_KEY" not in environment(process)
    await isolated.close()


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
    await until(lambda: session_nice(process) in {None, 4})
    assert os.readlink(here / "fd" / "0") == "/dev/null"
    # Those of its event loop aside it has the socket and the pipe that its server gave it.
    files = {os.readlink(fd) for fd in (here / "fd").iterdir()}
    assert not {name for name in files if name.startswith("/")} - {"/dev/null"}


async def test_the_first_process_is_idle_when_it_serves_and_others_from_the_beginning(
    tmp_path: Path,
) -> None:
    isolated = await opened(looping(tmp_path / "model.onnx"), nice=19, idle=True)
    (process,) = processes()
    assert {os.sched_getscheduler(thread) for thread in threads_of(process)} == {os.SCHED_IDLE}
    await until(lambda: session_nice(process) in {None, 19})
    os.kill(process, signal.SIGKILL)
    await until(lambda: bool(processes()) and processes() != [process])
    assert os.sched_getscheduler(processes()[-1]) == os.SCHED_IDLE
    await isolated.close()


def threads_of(process: int) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{process}/task").iterdir()]


def session_nice(process: int) -> int | None:
    """Of the session that it leads; None where Linux does not share processors out by sessions."""
    autogroup = Path(f"/proc/{process}/autogroup")
    return int(autogroup.read_text().split()[-1]) if autogroup.exists() else None
