"""Which execution provider of ONNX Runtime is used, and what is said of it."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.backends.onnx_backend import open_onnx, require_one_on_the_gpu
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import ConfigurationError, InvalidModel
from tests.tiny_models import onnx_model

SOON = Deadline.after(3_600)
CPU = "CPUExecutionProvider"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Computes `y = a + 2 b` from `x` `[n, 2]`."""
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model("regression").SerializeToString())
    return path


async def statement(
    model: Path, caplog: pytest.LogCaptureFixture, **options: object
) -> logging.LogRecord:
    """The one line that is logged of a model that is opened, and does execute."""
    caplog.set_level(logging.INFO, "app.backends")
    backend = await open_onnx(OnnxOptions.model_validate({"use": "onnx"} | options), model, ["y"])
    outputs = await backend.execute({"x": np.array([[1.0, 2.0]], np.float32)}, SOON)
    assert outputs["y"].tolist() == [[5.0]]
    await backend.close()
    (record,) = caplog.records
    return record


async def test_a_provider_that_is_not_there_is_passed_over_and_the_log_says_why(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent = "AbsentExecutionProvider"
    said = vars(await statement(model, caplog, providers=[absent, "cpu"], threads=2))
    assert (said["provider"], said["threads"], said["instances"]) == (CPU, 2, 1)
    assert list(said["passed_over"]) == [absent]
    assert said["passed_over"][absent].startswith("not among [")
    assert CPU in said["passed_over"][absent]


async def test_the_first_that_starts_is_used(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = vars(await statement(model, caplog, providers=["cpu", "cuda"]))
    assert (said["provider"], said["passed_over"]) == (CPU, {})


async def test_another_provider_is_used_by_its_name(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    azure = "AzureExecutionProvider"  # what the extra `cpu` has beside the CPU's
    said = vars(await statement(model, caplog, providers=[azure, "cpu"]))
    assert said["provider"] == azure


async def test_a_list_without_the_cpu_refuses_to_fall_back_to_it(model: Path) -> None:
    options = OnnxOptions(use="onnx", providers=("AbsentExecutionProvider",))
    with pytest.raises(InvalidModel, match=r"model\.onnx: no provider .* Absent.*: not among \["):
        await open_onnx(options, model, ["y"])


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_several_workers_do_not_each_load_a_model_onto_the_gpu(provider: str) -> None:
    require_one_on_the_gpu(provider, workers=1)
    require_one_on_the_gpu(CPU, workers=2)
    with pytest.raises(ConfigurationError, match=r"each of 2 workers .* share a Triton"):
        require_one_on_the_gpu(provider, workers=2)


def test_where_onnx_runtime_is_not_installed_the_operator_is_told_what_to_install(
    model: Path,
) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
sys.modules["onnxruntime"] = None  # as if it were not installed
from app.backends import open_backend
from app.contract import EchoOptions, OnnxOptions
from app.errors import ConfigurationError
from app.tensors import Signature

async def main():
    await open_backend(EchoOptions(use="echo"), Path({str(model)!r}), Signature((), ()))
    try:
        await open_backend(OnnxOptions(use="onnx"), Path({str(model)!r}), Signature((), ()))
    except ConfigurationError as exc:
        print(exc)

asyncio.run(main())
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.startswith("onnxruntime is not installed")
    assert "`cpu`" in said
