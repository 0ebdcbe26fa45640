"""Calls to the repository and the vault, on threads of their own: a stalled disk stalls no loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from app.backends.execution_threads import ExecutionThreads
from app.errors import RepositoryUnavailable

T = TypeVar("T")

_MOST_LEFT_BEHIND = 4


class BlockingCalls:
    """As many calls at once as there are `threads`. One that takes too long is given up; its thread
    is left behind until the system lets it return, and while too many are, every call is refused.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ExecutionThreads("repository", threads)
        self._waited_for = 0

    @property
    def under_way(self) -> int:
        """Calls that have not returned yet, those among them that were given up."""
        return self._waited_for + self._threads.left_behind

    async def call(self, work: Callable[[], T], within_s: float) -> T:
        """What `work` returns or raises. `RepositoryUnavailable` when it is given up."""
        if self._threads.left_behind >= _MOST_LEFT_BEHIND:
            raise RepositoryUnavailable("earlier calls to the repository have not returned yet")
        self._waited_for += 1
        try:
            async with asyncio.timeout(within_s):
                return await self._threads.call(work, _let_it_end)
        except TimeoutError as exc:
            raise RepositoryUnavailable(f"no answer within {within_s:g} s") from exc
        finally:
            self._waited_for -= 1

    async def close(self) -> None:
        await self._threads.close()


def _let_it_end() -> None:
    """Nothing interrupts a call of the system."""
