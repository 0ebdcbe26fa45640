"""A backend that answers each output with the input of the same position: for tests and floors."""

from app.backends.execution_times import ExecutionTimes
from app.deadline import Deadline
from app.errors import BackendError
from app.tensors import Signature, Tensors


class EchoBackend:
    """The signature must have as many inputs as outputs."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature

    @property
    def signature(self) -> Signature:
        return self._signature

    @property
    def concurrency(self) -> int:
        return 1

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        missing = [spec.name for spec in self._signature.inputs if spec.name not in inputs]
        if missing:
            raise BackendError(f"no input {', '.join(missing)}")
        return {
            target.name: inputs[source.name]
            for source, target in zip(self._signature.inputs, self._signature.outputs, strict=True)
        }

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        return ExecutionTimes({})

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        return None
