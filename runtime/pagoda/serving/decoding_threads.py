"""Where messages of clients are decoded and checked: small ones on the event loop, others beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from pagoda.serving.json_decoding import LARGE_BYTES

T = TypeVar("T")

MAX_THREADS = 4
"""Each that holds the interpreter lock makes the event loop wait up to 5 ms for it."""


class DecodingThreads:
    """Runs what may take long, for a few large messages at a time."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(MAX_THREADS)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on a message of `size` bytes. A thread that has begun ends, whoever waits for it or not."""
        if size <= LARGE_BYTES:
            return work()
        async with self._turns:
            return await asyncio.to_thread(work)
