"""Whether the client at the other end of a stream still reads, for one timer a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from pagoda.serving.interruptible_wait import BoundedWait


class ReaderWatch:
    """Ends a send that takes `seconds`, and all after it, with `error`: nobody has read anything for so long.

    Sends come one at a time, from whichever task. `close` it when there will be no more.
    """

    def __init__(self, seconds: float, error: Exception) -> None:
        self._seconds = seconds
        self._error = error
        self._wait = BoundedWait()
        self._loop = asyncio.get_running_loop()
        self._sending_since = 0.0
        self._look()

    async def run(self, sending: Awaitable[Any]) -> None:
        """Wait for one send."""
        self._sending_since = self._loop.time()
        await self._wait.run(sending)

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        waited = self._loop.time() - self._sending_since if self._wait.is_waiting else 0.0
        if waited >= self._seconds:
            self._wait.interrupt(self._error)
            return
        self._timer = self._loop.call_later(self._seconds - waited, self._look)
