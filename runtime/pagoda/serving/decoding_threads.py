"""Where messages of clients are decoded and checked: small ones on the event loop, others beside it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TypeVar

from pagoda.fair_turns import FairTurns
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.json_decoding import LARGE_BYTES
from pagoda.serving.request_memory import RequestMemory

T = TypeVar("T")

MAX_THREADS = 4
"""Each that holds the interpreter lock makes the event loop wait up to 5 ms for it."""


class DecodingThreads:
    """Runs what may take long, for a few large messages at a time, by tenant in turn; `memory` bounds those that wait."""

    def __init__(self, memory: RequestMemory) -> None:
        self.memory = memory
        self._turns = FairTurns(MAX_THREADS, sys.maxsize, "a thread that decodes")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on a message of `size` bytes. A thread that has begun ends, whoever waits for it or not."""
        if size <= LARGE_BYTES:
            return work()
        caller = caller_var.get()
        await self._turns.take(caller.tenant, caller.limits.weight)
        try:
            return await asyncio.to_thread(work)
        finally:
            self._turns.give_back()
