"""Several asynchronous streams side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """A stream is over, with this error or none."""

    error: Exception | None


@asynccontextmanager
async def cancelling(tasks: Iterable[asyncio.Task[Any]]) -> AsyncIterator[None]:
    """However the block is left, none of the tasks outlives it."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """`(index of the stream, item)` of all streams as they come; the first error closes the others and is raised.

    Each stream is read one item ahead at most, so that a slow reader holds back what is buffered here.
    """
    queue: asyncio.Queue[tuple[int, T] | _End] = asyncio.Queue(maxsize=len(streams))

    async def read(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
        except Exception as error:  # handed to the reader of the queue, who raises it
            await queue.put(_End(error))
        else:
            await queue.put(_End(None))

    tasks: list[asyncio.Task[None]] = []
    async with cancelling(tasks):
        for index, stream in enumerate(streams):
            tasks.append(asyncio.create_task(read(index, stream)))
            await asyncio.sleep(0)  # each begins in a turn of the loop of its own: they may have much to do
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                try:
                    raise item.error
                finally:
                    del item  # its error holds this frame through its traceback
            else:
                num_open -= 1
