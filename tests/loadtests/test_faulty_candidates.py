"""Candidates that go wrong on some rows answer all others as their oracle says."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.backends import open_backend
from app.backends.backend import Backend, BackendDied
from app.contract import Isolation, OnnxOptions
from app.deadline import Deadline
from app.errors import DeadlineExceeded
from app.tensors import Signature, TensorSpec
from loadtests.faulty_candidates import FAULTS, Fault, faulty_model, is_bad
from loadtests.memory import resident_mb
from loadtests.oracle_model import INPUTS, Oracle, Row
from tests.backends.isolated_models import SOON, processes

SIGNATURE = Signature(
    (TensorSpec("x", "float32", (2,)),),
    (TensorSpec("sum", "float32", (1,)), TensorSpec("check", "float32", (1,))),
)
ORACLE = Oracle(7)


def rows_of(some: list[Row]) -> dict[str, NDArray[np.float32]]:
    return {"x": np.array(some, np.float32)}


def bad_row(fault: Fault) -> Row:
    return next((200, b) for b in range(INPUTS) if is_bad((200, b), fault))


async def opened(fault: Fault, folder: Path, isolation: Isolation | None = None) -> Backend:
    model = folder / f"{fault}.onnx"
    model.write_bytes(faulty_model(ORACLE, fault, turns=10).SerializeToString())
    return await open_backend(OnnxOptions(use="onnx", isolated=isolation), model, SIGNATURE)


@pytest.mark.parametrize("fault", FAULTS)
async def test_other_rows_are_answered_as_the_oracle_says(fault: Fault, tmp_path: Path) -> None:
    backend = await opened(fault, tmp_path)
    drawn = np.random.default_rng(2013).integers(0, INPUTS, (40, 2)).tolist()
    some: list[Row] = [(a, b) for a, b in drawn if not is_bad((a, b), fault)]
    outputs = await backend.execute(rows_of(some), SOON)
    said = np.hstack([outputs["sum"], outputs["check"]])
    assert said.tolist() == [list(map(float, ORACLE.answer(row))) for row in some]
    await backend.close()


async def test_each_fault_shows_on_a_bad_row(tmp_path: Path) -> None:
    faults: dict[Fault, type[Exception]] = {"hang": DeadlineExceeded, "crash": BackendDied}
    for fault, error in faults.items():
        backend = await opened(fault, tmp_path, Isolation(stuck_s=0.1))
        with pytest.raises(error):
            await backend.execute(rows_of([bad_row(fault)]), Deadline.after(0.1))
        await backend.close()
    backend = await opened("grow", tmp_path, Isolation())
    (process,) = processes()
    before_mb = resident_mb(process)
    await backend.execute(rows_of([bad_row("grow")]), SOON)
    assert resident_mb(process) > before_mb + 100
    await backend.close()
