"""Executes a model with ONNX Runtime, in the event loop while that is cheaper than a thread."""

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# The wheel would write a device id below the home folder and may send usage data.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from app.errors import BackendError, InvalidModel
from app.tensors import Signature, Tensors, TensorSpec, row_count, take_rows

# A thread hop costs about 90 µs; an execution longer than this would hold up every other caller.
MAX_INLINE_S = 0.001

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
        self._row_cost_s = float("inf")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnx")

    @property
    def signature(self) -> Signature:
        return self._signature

    async def execute(self, inputs: Tensors) -> Tensors:
        if row_count(inputs) * self._row_cost_s <= MAX_INLINE_S:
            return self._run(inputs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, inputs)

    async def warm_up(self, example: Tensors, max_rows: int) -> None:
        """Also measures what a row costs, by which `execute` chooses between loop and thread."""
        loop = asyncio.get_running_loop()
        rows = 1
        while rows < max_rows:
            await loop.run_in_executor(self._thread, self._run, _repeated(example, rows))
            rows *= 2
        full = _repeated(example, max_rows)
        self._row_cost_s = await loop.run_in_executor(self._thread, self._measure_row_s, full)

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, inputs: Tensors) -> Tensors:
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as exc:  # onnxruntime raises RuntimeError and its own bare Exceptions
            raise BackendError(f"ONNX Runtime: {exc}") from exc
        return dict(zip(self._outputs, results, strict=True))

    def _measure_row_s(self, inputs: Tensors) -> float:
        """Seconds a row in a full batch: the median of a few runs after a discarded one."""
        self._run(inputs)
        seconds = []
        for _ in range(5):
            started_s = time.perf_counter()
            self._run(inputs)
            seconds.append(time.perf_counter() - started_s)
        return sorted(seconds)[2] / row_count(inputs)


def open_onnx(model: Path, outputs: Sequence[str]) -> OnnxBackend:
    """Load an ONNX file that computes `outputs`. Raises `InvalidModel` when it cannot be loaded."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Spinning threads take the core from the event loop that feeds them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
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


def _repeated(example: Tensors, rows: int) -> Tensors:
    copies = -(-rows // row_count(example))
    return take_rows(
        {name: np.concatenate([tensor] * copies) for name, tensor in example.items()}, 0, rows
    )
