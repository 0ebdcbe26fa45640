"""The inspection of an ONNX file: what no runtime ever sees, and what it lets through."""

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from app.backends.onnx_inspection import inspect_file
from app.errors import InvalidModel
from app.repository.manifest import MODEL_FILE
from loadtests.hostile_models import (
    Hostile,
    honest,
    matmul,
    model,
    publish_as_it_is,
    seen_without_executing,
    tensor,
    write,
)


@pytest.mark.parametrize("hostile", seen_without_executing(), ids=lambda each: each.name)
def test_a_file_that_could_harm_is_refused_with_its_reason(
    tmp_path: Path, hostile: Hostile
) -> None:
    version = publish_as_it_is(hostile, tmp_path / "1")
    with pytest.raises(InvalidModel, match=hostile.reason) as refused:
        inspect_file(version.folder / MODEL_FILE, tuple(version.manifest.files))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("files", [("weights.bin",), None], ids=["listed", "any of the folder"])
def test_weights_beside_the_model_may_be_named(
    tmp_path: Path, files: tuple[str, ...] | None
) -> None:
    honest(tmp_path)
    inspect_file(tmp_path / MODEL_FILE, files)


def test_functions_of_the_file_and_operators_of_its_runtime_may_be_used(tmp_path: Path) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    nodes = [helper.make_node("Gelu", ["i"], ["o"], domain="com.microsoft")]
    function = helper.make_function("mine", "Twice", ["i"], ["o"], nodes, imports)
    used = [helper.make_node("Twice", ["x"], ["same"], domain="mine"), matmul("same")]
    opsets = {"": 17, "com.microsoft": 1, "mine": 1}
    write(tmp_path, model(used, opsets=opsets, functions=[function]))
    inspect_file(tmp_path / MODEL_FILE, ())


@pytest.mark.parametrize("typed", [False, True], ids=["bytes", "numbers"])
@pytest.mark.parametrize(
    "value",
    [
        np.zeros((0, 3), np.float32),
        np.float32(1),
        np.ones((2, 3), np.float16),
        np.ones(3, np.bool_),
        np.ones(3, np.int8),
        np.array(["a", "b"], object),
        np.ones(2, np.complex64),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_tensors_of_every_form_may_be_held(tmp_path: Path, value: np.ndarray, typed: bool) -> None:
    held = numpy_helper.from_array(np.asarray(value), "held")
    if typed and value.dtype != object:
        flat = np.asarray(value).ravel().tolist()
        held = helper.make_tensor("held", held.data_type, value.shape, flat)
    write(tmp_path, model([matmul()], [tensor("weights", [[1.0], [2.0]]), held]))
    inspect_file(tmp_path / MODEL_FILE, ())
