"""What the Triton backend does with one real Triton, over both protocols."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

from app.backends.backend import BackendDied
from app.backends.triton import TritonBackend
from app.deadline import Deadline
from app.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidModel,
    ModelNotReady,
    Overloaded,
    RequestError,
)
from app.tensors import Signature, TensorSpec
from loadtests.triton_markers import DIE, RAISE, SLEEP
from loadtests.triton_process import TritonProcess
from tests.backends.opened_triton import SIGNATURE, SOON, answered, opened, rows
from tests.tiny_models import onnx_model

pytestmark = pytest.mark.triton

REGRESSION = onnx_model("regression").SerializeToString()
TEXTS = helper.make_model(
    helper.make_graph(
        [
            helper.make_node("Identity", ["word"], ["same"]),
            helper.make_node("ReduceSum", ["number", "axis"], ["total"], keepdims=0),
        ],
        "texts",
        [
            helper.make_tensor_value_info("word", TensorProto.STRING, ["rows", 1]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["rows", 2]),
        ],
        [
            helper.make_tensor_value_info("same", TensorProto.STRING, ["rows", 1]),
            helper.make_tensor_value_info("total", TensorProto.INT64, ["rows"]),
        ],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    ),
    ir_version=9,
    opset_imports=[helper.make_opsetid("", 17)],
)
"""`same` is `word`; `total` `[N]` is the sum of `number`."""


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(triton: TritonProcess) -> TritonProcess:
    """The Triton with some more models."""
    policy = "dynamic_batching { default_queue_policy { %s } }"
    both = "version_policy { latest { num_versions: 2 } } " + policy
    for version in (1, 2):
        queued = both % "allow_timeout_override: true"
        triton.put("two", REGRESSION, version=version, max_batch_size=2, more=queued)
    triton.put("texts", TEXTS.SerializeToString())
    triton.put("single", REGRESSION, max_batch_size=0)
    triton.put("small", REGRESSION, max_batch_size=8, more=policy % "max_queue_size: 1")
    triton.put("mortal", REGRESSION)
    with ThreadPoolExecutor() as threads:
        list(threads.map(triton.load, ("two", "texts", "single", "small", "mortal")))
    return triton


@pytest.fixture
def endpoint(models: TritonProcess, protocol: str) -> Iterator[str]:
    """Where the Triton is asked; what a test stopped runs again afterwards."""
    yield models.endpoint(protocol)
    if not models.is_alive:
        models.launch()
        models.ready()


async def test_the_model_may_have_another_name_and_version_at_triton(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened(
        [endpoint], "published/3", protocol=protocol, model="two", version=2
    ) as backend:
        assert await answered(backend, (1, 2)) == [5.0]


async def test_an_older_version_is_served_beside_a_newer_one(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], "two/1", protocol=protocol) as backend:
        assert await answered(backend, (1, 2)) == [5.0]


async def test_texts_and_tensors_of_the_batch_axis_alone_are_served(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    signature = Signature(
        (TensorSpec("number", "int64", (2,)), TensorSpec("word", "str", (1,))),
        (TensorSpec("total", "int64", ()), TensorSpec("same", "str", (1,))),
    )
    async with opened([endpoint], "texts/1", protocol=protocol, signature=signature) as backend:
        assert backend.signature == signature
        inputs = {
            "number": np.array([[1, 2], [2**40, 1]]),
            "word": np.array([["é"], [""]], object),
        }
        outputs = await backend.execute(inputs, SOON)
    assert outputs["total"].tolist() == [3, 2**40 + 1]
    assert outputs["same"].tolist() == [["é"], [""]]


async def test_a_model_that_takes_no_batches_is_refused(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    with pytest.raises(InvalidModel, match="max_batch_size, it takes no batches"):
        async with opened([endpoint], "single/1", protocol=protocol):
            pass


async def test_a_model_without_a_wanted_output_is_refused(endpoint: str, protocol: str) -> None:
    signature = Signature(SIGNATURE.inputs, (TensorSpec("z", "float32", (1,)),))
    with pytest.raises(InvalidModel, match=r"has no output \['z'\], it has \['y'\]"):
        async with opened([endpoint], protocol=protocol, signature=signature):
            pass


async def test_a_version_that_triton_does_not_have_is_refused(endpoint: str, protocol: str) -> None:
    with pytest.raises(InvalidModel, match=r"no Triton has it ready: .*the model is not ready"):
        async with opened([endpoint], "regression/2", protocol=protocol, start_timeout_s=0):
            pass


async def test_smaller_batches_than_the_contract_promises_are_refused(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], "small/1", protocol=protocol) as backend:
        with pytest.raises(InvalidModel, match=r"max_batch_rows is 64, .* is 8"):
            await backend.warm_up(rows(), 64)


# tritonclient hands its body over as bytes; aiohttp would rather have a file.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_five_megabytes_are_answered(endpoint: str, protocol: str) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        x = np.arange(1_400_000, dtype=np.float32).reshape(-1, 2) % 1000
        outputs = await backend.execute({"x": x}, SOON)
    np.testing.assert_array_equal(outputs["y"], x[:, :1] + 2 * x[:, 1:])


async def test_more_rows_than_triton_takes_at_once_are_answered_in_order(
    endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], "small/1", protocol=protocol) as backend:
        assert await answered(backend, *((row, 0) for row in range(20))) == list(range(20))


async def test_a_row_that_the_model_raises_on_is_a_backend_error(
    endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        with pytest.raises(BackendError, match="a row asked for it"):
            await backend.execute(rows((RAISE, 0)), SOON)
        assert await answered(backend, (1, 2)) == [5.0]


async def test_a_row_that_ends_the_models_process_is_told_apart(
    endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], "mortal/1", protocol=protocol) as backend:
        with pytest.raises(BackendDied):
            await backend.execute(rows((DIE, 0)), SOON)


async def test_after_the_deadline_nobody_waits(endpoint: str, protocol: str) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        with pytest.raises(DeadlineExceeded):
            await backend.execute(rows((SLEEP, 500)), Deadline.after(0.05))
        assert await answered(backend, (1, 2)) == [5.0]


async def test_what_nobody_waits_for_keeps_its_place_at_triton(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    before = triton.executed("regression")
    async with opened([endpoint], protocol=protocol, in_flight=2) as backend:
        late = (backend.execute(rows((SLEEP, 300)), Deadline.after(0.1)) for _ in range(20))
        results = await asyncio.gather(*late, return_exceptions=True)
        assert {type(result) for result in results} == {DeadlineExceeded}
        assert await answered(backend, (1, 2)) == [5.0]
    assert triton.executed("regression") - before <= 3


async def test_what_waits_in_tritons_queue_past_its_deadline_is_not_executed(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    before = triton.executed("two")
    whole_batch = rows((SLEEP, 300), (SLEEP, 300))
    async with opened([endpoint], "two/1", protocol=protocol, in_flight=8) as backend:
        late = [backend.execute(whole_batch, Deadline.after(0.3)) for _ in range(6)]
        await asyncio.gather(*late, return_exceptions=True)
    assert triton.executed("two") - before < 6


async def test_a_full_queue_is_an_overload(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], "small/1", protocol=protocol, in_flight=16) as backend:
        many = [backend.execute(rows((SLEEP, 50)), SOON) for _ in range(16)]
        results = await asyncio.gather(*many, return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    assert refused
    assert {type(result) for result in refused} == {Overloaded}


async def test_callers_that_leave_around_the_answer_harm_neither_triton_nor_others(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    """A cancelled request crashes this Triton when the cancellation meets the completion."""
    async with opened([endpoint], protocol=protocol, in_flight=16) as backend:

        async def leave(after_turns: int) -> None:
            execution = asyncio.create_task(backend.execute(rows(), SOON))
            for _ in range(after_turns):
                await asyncio.sleep(0)
            execution.cancel()
            await asyncio.wait({execution})

        for _ in range(20):
            answers = (answered(backend, (turn, turn)) for turn in range(16))
            results = await asyncio.gather(*answers, *(leave(2 * turn) for turn in range(40)))
            assert results[:16] == [[3.0 * turn] for turn in range(16)]
    assert triton.is_alive


async def test_a_model_that_is_unloaded_under_load_is_not_ready_until_it_is_back(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        await asyncio.to_thread(triton.unload, "regression")
        error = await _first_error(backend)
        assert isinstance(error, ModelNotReady)
        with pytest.raises(ModelNotReady, match="ready"):
            await backend.check()
        await asyncio.to_thread(triton.load, "regression")
        await _until_up(backend)
        assert await answered(backend, (1, 2)) == [5.0]


async def test_a_triton_that_is_killed_is_not_ready_until_it_is_back(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        await answered(backend, (1, 2))
        waiting = asyncio.create_task(backend.execute(rows((SLEEP, 60_000)), SOON))
        await asyncio.sleep(0)  # it has begun
        triton.kill()
        with pytest.raises(ModelNotReady):
            await waiting
        assert isinstance(await _first_error(backend), ModelNotReady)
        with pytest.raises(ModelNotReady, match=endpoint):
            await backend.check()
        triton.launch()
        await _until_up(backend)
        assert await answered(backend, (1, 2)) == [5.0]


async def test_a_triton_that_hangs_holds_nobody_until_the_deadline(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        await answered(backend, (1, 2))
        triton.pause()
        try:
            with pytest.raises(ModelNotReady, match="says nothing"):
                await backend.execute(rows(), SOON)
        finally:
            triton.resume()
        await _until_up(backend)
        assert await answered(backend, (1, 2)) == [5.0]


async def test_a_slow_model_is_no_triton_that_hangs(endpoint: str, protocol: str) -> None:
    async with opened([endpoint], protocol=protocol) as backend:
        assert await answered(backend, (SLEEP, 700)) == [SLEEP + 1400]


async def test_a_model_that_comes_back_as_another_is_not_used(
    triton: TritonProcess, endpoint: str, protocol: str
) -> None:
    other = onnx_model("regression")
    other.graph.initializer[0].CopyFrom(
        helper.make_tensor(other.graph.initializer[0].name, TensorProto.FLOAT, [2, 1], [1.0, 3.0])
    )
    async with opened([endpoint], protocol=protocol) as backend:
        await backend.warm_up(rows(), 4)
        await asyncio.to_thread(triton.unload, "regression")
        await _first_error(backend)
        triton.put("regression", other.SerializeToString())
        await asyncio.to_thread(triton.load, "regression")
        try:
            await _until_it_says(backend, "is not what it was")
        finally:
            triton.put("regression", REGRESSION)
            await asyncio.to_thread(triton.load, "regression")
        await _until_up(backend)
        assert await answered(backend, (1, 2)) == [5.0]


async def _first_error(backend: TritonBackend) -> RequestError:
    while True:
        try:
            await backend.execute(rows(), SOON)
        except RequestError as exc:
            return exc


async def _until_it_says(backend: TritonBackend, reason: str) -> None:
    while reason not in str(await _first_error(backend)):  # noqa: ASYNC110 (another process)
        await asyncio.sleep(0.01)


async def _until_up(backend: TritonBackend) -> None:
    while True:
        try:
            return await backend.check()
        except ModelNotReady:
            await asyncio.sleep(0.01)
