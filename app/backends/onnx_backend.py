"""Executes a model with ONNX Runtime, in the event loop while that is cheaper than a thread."""

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The wheel would write a device id below the home folder and may send usage data.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from app.backends.execution_times import MAX_INLINE_S, ExecutionTimes, warm_up_batches
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import BackendError, InvalidModel
from app.tensors import Signature, Tensors, TensorSpec, row_count

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
}


class OnnxBackend:
    """One session on the CPU, one thread an execution: cores are used by more workers."""

    def __init__(self, session: ort.InferenceSession, outputs: Sequence[str]) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._signature = Signature(
            tuple(_spec(node) for node in session.get_inputs()),
            tuple(_spec(node) for node in session.get_outputs() if node.name in self._outputs),
        )
        self._times = ExecutionTimes({}, unknown_s=float("inf"))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnx")

    @property
    def signature(self) -> Signature:
        return self._signature

    @property
    def concurrency(self) -> int:
        return 1

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        if self._times.predicted_s(row_count(inputs)) <= MAX_INLINE_S:
            return self._run(inputs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, inputs)

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """What it measures also decides between the event loop and the thread."""
        loop = asyncio.get_running_loop()
        measured: dict[int, float] = {}
        for rows, batch in warm_up_batches(example, max_rows):
            measured[rows] = await loop.run_in_executor(self._thread, self._measure_s, batch)
        self._times = ExecutionTimes(measured)
        return ExecutionTimes(measured, in_loop=True)

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, inputs: Tensors) -> Tensors:
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as exc:  # onnxruntime raises RuntimeError and its own bare Exceptions
            raise BackendError(f"ONNX Runtime: {exc}") from exc
        return dict(zip(self._outputs, results, strict=True))

    def _measure_s(self, inputs: Tensors) -> float:
        """Seconds of an execution: the median of a few runs after a discarded one."""
        self._run(inputs)
        seconds = []
        for _ in range(5):
            started_s = time.perf_counter()
            self._run(inputs)
            seconds.append(time.perf_counter() - started_s)
        return sorted(seconds)[2]


async def open_onnx(options: OnnxOptions, model: Path, outputs: Sequence[str]) -> OnnxBackend:
    """Load an ONNX file that computes `outputs`. Raises `InvalidModel` when it cannot be loaded."""
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    # Spinning threads take the core from the event loop that feeds them.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(
            str(model), session_options, providers=["CPUExecutionProvider"]
        )
    except Exception as exc:  # onnxruntime raises its own exceptions without a common base
        raise InvalidModel(f"{model}: ONNX Runtime cannot load it: {exc}") from exc
    known = {node.name for node in session.get_outputs()}
    missing = [name for name in outputs if name not in known]
    if missing:
        raise InvalidModel(f"{model}: has no output {missing}, it has {sorted(known)}")
    return OnnxBackend(session, outputs)


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise InvalidModel(f"{node.name}: tensors of type {node.type} cannot be served")
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape[1:])
    return TensorSpec(node.name, _DTYPES[node.type], shape)
