"""The end of a task, by who has started it."""

import asyncio


async def ended(task: "asyncio.Task[None]") -> None:
    """Cancel it and wait until it has ended, however it does."""
    task.cancel()
    await asyncio.wait({task})
