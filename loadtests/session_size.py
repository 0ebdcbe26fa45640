"""Prints how many MB one more session of a model file holds: `python -m … FILE INPUT COLUMNS`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from loadtests.memory import resident_mb

_OPENED = 3


def measured_mb(model: Path, name: str, columns: int) -> float:
    """Of a model with one input of float32 `[N, columns]`; in a process of its own."""
    command = [sys.executable, "-m", __name__, str(model), name, str(columns)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main(model: str, name: str, columns: int) -> None:
    sessions, seen_mb = [], []
    for _ in range(1 + _OPENED):  # the first one pays for the library, too
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.run(None, {name: np.zeros((1, columns), np.float32)})
        sessions.append(session)
        seen_mb.append(resident_mb("self"))
    print(max(0.0, (seen_mb[-1] - seen_mb[0]) / _OPENED))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
