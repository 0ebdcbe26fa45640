"""Opens the backend on Tritons, real or not, for a model that was never published."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.backends.backend import Tell, tell_nobody
from app.backends.triton import TritonBackend, open_triton
from app.contract import TritonOptions
from app.deadline import Deadline
from app.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (1,)),))
"""Of the kind `regression`: y = x[0] + 2 x[1]."""
SOON = Deadline.after(3_600)


@asynccontextmanager
async def opened(
    endpoints: Sequence[str],
    published: str = "regression/1",
    signature: Signature = SIGNATURE,
    tell: Tell = tell_nobody,
    **options: Any,
) -> AsyncIterator[TritonBackend]:
    """As the model and version that it would have been published as."""
    path = Path("models", published, "model.onnx")
    options = {"use": "triton", "endpoints": tuple(endpoints), "start_timeout_s": 60} | options
    backend = await open_triton(TritonOptions(**options), path, signature, tell)
    try:
        yield backend
    finally:
        await backend.close()


def rows(*values: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    return {"x": np.array(values or [(1, 2), (3, 4)], np.float32)}


async def answered(backend: TritonBackend, *values: Sequence[float]) -> list[float]:
    """The output `y` for these rows."""
    outputs = await backend.execute(rows(*values), SOON)
    return [float(number) for number in outputs["y"][:, 0]]
