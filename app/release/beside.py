"""Blocking calls beside the event loop, none of which is waited for for long."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from app.release.state import StateUnavailable

_WAIT_S = 1.0
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Beside:
    """One thread of its own, in which calls are made one after the other: a disk that hangs must
    not wait for others' threads, nor others for it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="release-state")

    async def run(
        self,
        call: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        """What the call returns or raises; `StateUnavailable` when that takes over a second: a call
        that has begun goes on, one that has not is not made any more."""
        try:
            async with asyncio.timeout(_WAIT_S):
                future = self._threads.submit(call, *args, **kwargs)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise StateUnavailable(f"the disk has not answered within {_WAIT_S:g} s") from None

    def close(self) -> None:
        """What has begun is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
