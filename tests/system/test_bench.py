"""The contenders that need no environment of their own start, answer rightly, and are gone."""

import sys
from pathlib import Path

import pytest

from loadtests.bench.contenders import CONTENDERS
from loadtests.bench.server import running
from loadtests.bench.workload import Workload, prepare

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return prepare("mlp", tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", ["echo", "ours", "fastapi", "fastapi-def"])
def test_a_contender_answers_as_onnx_runtime_does(name: str, workload: Workload) -> None:
    with running(CONTENDERS[name], Path(sys.executable), workload) as server:
        assert server.contender.name == name
