"""The port through which a batch is executed."""

from typing import Protocol

from app.tensors import Signature, Tensors


class Backend(Protocol):
    """Executes one loaded model version."""

    @property
    def signature(self) -> Signature: ...

    async def execute(self, inputs: Tensors) -> Tensors:
        """Output tensors with one row per input row, in order. The inputs are not kept or changed.

        Raises `BackendError`. Cancelling may leave the execution running; its result is dropped.
        """
        ...

    async def warm_up(self, example: Tensors, max_rows: int) -> None:
        """Run `example` repeated to sizes up to `max_rows`, so that nobody meets a cold model."""
        ...

    async def close(self) -> None:
        """Free what the model holds. No execution may be under way."""
        ...
