"""How long this process did not run although it wanted to: what others did to a measurement."""

import asyncio
import time
from types import TracebackType
from typing import Self

_LOOK_EVERY_S = 0.01


class Standstill:
    """Looks while it is entered; what is measured in a process that stood still says nothing."""

    def __init__(self) -> None:
        self.worst_s = 0.0
        self.total_s = 0.0
        """Of all that took longer than a tenth of a second."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _look(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            late_s = time.monotonic() - before_s - _LOOK_EVERY_S
            self.worst_s = max(self.worst_s, late_s)
            if late_s > 0.1:
                self.total_s += late_s
