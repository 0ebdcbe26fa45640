"""A published version that a Triton executes."""

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from app.errors import InvalidModel
from loadtests.triton_process import TritonProcess
from tests.tiny_models import answers, loaded, onnx_model, regression, write_model

pytestmark = pytest.mark.triton


async def test_a_version_that_triton_has_is_loaded_and_answers(
    triton: TritonProcess, tmp_path: Path
) -> None:
    await _publish(tmp_path, triton, "regression")
    async with loaded(tmp_path / "tiny") as model:
        (prediction,) = await answers(model, {"a": 3.0, "b": 4.0})
        assert prediction["value"] == regression(3.0, 4.0)


async def test_a_version_of_which_triton_has_another_file_is_refused(
    triton: TritonProcess, tmp_path: Path
) -> None:
    other = onnx_model("regression")
    (weights,) = other.graph.initializer
    weights.CopyFrom(helper.make_tensor(weights.name, TensorProto.FLOAT, [2, 1], [1.0, 3.0]))
    triton.put("other", other.SerializeToString())
    triton.load("other")
    await _publish(tmp_path, triton, "other")
    with pytest.raises(InvalidModel, match="golden"):
        async with loaded(tmp_path / "tiny"):
            pass


async def _publish(repository: Path, triton: TritonProcess, model: str) -> None:
    endpoint = triton.endpoint("grpc")
    backend = {"use": "triton", "endpoints": [endpoint], "model": model, "version": 1}
    await write_model(repository, "tiny", "regression", backend=backend)
