"""The port through which a batch is executed."""

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

from app.backends.execution_times import ExecutionTimes
from app.deadline import Deadline
from app.errors import BackendError
from app.tensors import Signature, Tensors


class BackendDied(BackendError):
    """What executed the rows died of it; they may be run once more, in smaller batches."""


Event: TypeAlias = Literal["sent_again", "executed_locally", "process_ended", "loaded_again"]
"""What an operator wants to know of a backend beside its executions: one of them went to Triton
once more, was left to the local copy, a process of its own ended, or the model was loaded again for
want of memory."""

Tell: TypeAlias = Callable[[Event], None]


def tell_nobody(event: Event) -> None:
    """Where nobody counts."""


class Backend(Protocol):
    """Executes one loaded model version."""

    @property
    def signature(self) -> Signature: ...

    @property
    def concurrency(self) -> int:
        """How many executions may be under way at once: more would only wait inside."""
        ...

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors:
        """Output tensors with one row per input row, in order. The inputs are not kept or changed.

        After `deadline` nobody waits for the outputs. Raises `BackendError` where the rows may be
        the reason (`BackendDied` where they killed what ran them), and what says nothing about
        them where they are not: `ModelNotReady` when what executes cannot be reached or has not
        loaded the model, `Overloaded` when it has no room, `DeadlineExceeded`. Cancelling gives
        the execution up, and the backend is as able to take the next one as before.
        """
        ...

    async def warm_up(self, example: Tensors, max_rows: int) -> ExecutionTimes:
        """Run `example` repeated to sizes up to `max_rows`, so that nobody meets a cold model, and
        say how long each size took."""
        ...

    async def check(self) -> None:
        """Raises `ModelNotReady` with the reason while it could execute nothing."""
        ...

    async def close(self) -> None:
        """Free what the model holds. No execution may be under way."""
        ...
