"""Makes the environment of requirements/triton-server.txt able to start a Triton.

    python -m loadtests.triton_environment .venv-triton

The wheel nvidia-pytriton brings tritonserver with its Python backend, which loads libpython of the
environment's version: from where Python or the system has it, else out of Debian's package.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FACTS = """
import json, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
print(json.dumps([version, sysconfig.get_config_var("LIBDIR"), sysconfig.get_path("purelib")]))
"""
_UNPACKED = "libpython"
_SYSTEM = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


class Unusable(Exception):
    """What is missing, in one sentence."""


@dataclass(frozen=True)
class TritonEnvironment:
    """Where the parts of an environment are."""

    bin: Path
    server: Path
    """The folder with tritonserver and its backends."""
    libraries: Path
    libpython: Path

    def variables(self) -> dict[str, str]:
        """For the process of tritonserver; its Python backend finds packages by way of PATH."""
        return {
            "LD_LIBRARY_PATH": f"{self.libpython}:{self.libraries}",
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
        }


def triton_environment(root: Path) -> TritonEnvironment:
    """The prepared environment in this folder. Raises `Unusable`."""
    python = root / "bin" / "python"
    if not python.exists():
        raise Unusable(f"{root}: no environment for Triton; `make test` builds it")
    facts = subprocess.run([python, "-c", _FACTS], capture_output=True, text=True, check=True)
    version, libdir, packages = json.loads(facts.stdout)
    server = Path(packages) / "pytriton" / "tritonserver"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        shutil.copy(server / "python_backend_stubs" / version / stub.name, stub)
    library = f"libpython{version}.so.1.0"
    unpacked = root.resolve() / _UNPACKED
    for folder in (unpacked, Path(libdir), *map(Path, _SYSTEM)):
        if (folder / library).exists():
            break
    else:
        folder = _unpack(version, library, unpacked)
    return TritonEnvironment(
        root.resolve() / "bin", server, Path(packages) / "nvidia_pytriton.libs", folder
    )


def _unpack(version: str, library: str, into: Path) -> Path:
    """Out of Debian's package, which need not be installed for that."""
    package = f"libpython{version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["apt-get", "download", package], cwd=folder, capture_output=True, check=True
            )
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", archive, f"{folder}/root"], check=True)
            (found,) = Path(folder, "root").rglob(library)
        except (OSError, subprocess.CalledProcessError, ValueError) as exc:
            raise Unusable(
                f"Triton's Python backend needs {library}: install {package} (or a Python built "
                f"with --enable-shared), or leave its tests out with `make test TRITON=0`"
            ) from exc
        into.mkdir(exist_ok=True)
        shutil.copy(found, into / library)
    return into


def main() -> int:
    try:
        environment = triton_environment(Path(sys.argv[1]))
    except Unusable as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"• Triton in {environment.server}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
