"""The contenders that need no environment of their own start, answer rightly, and are gone."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.bench.contenders import CONTENDERS
from loadtests.bench.server import running
from loadtests.bench.workload import Workload, tensor_workload

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workload]:
    with tensor_workload("mlp", tmp_path_factory.mktemp("bench")) as workload:
        yield workload


@pytest.mark.parametrize("name", ["echo", "protocol-echo", "ours", "ours-asgi", "fastapi"])
def test_a_contender_answers_as_onnx_runtime_does(name: str, workload: Workload) -> None:
    with running(CONTENDERS[name], Path(sys.executable), workload) as server:
        assert server.contender.name == name
