"""A timeout for clients that stop reading their stream, for the price of one timer a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pagoda.serving.interruptible_wait import InterruptibleWait


class StalledClientTimeout:
    """Ends a send that takes `seconds`, and all after it, with an error: the client has read nothing for so long.

    Sends come one at a time, from whichever task. Call `close` after the last one.
    """

    def __init__(self, seconds: float, make_error: Callable[[], Exception]) -> None:
        self._seconds = seconds
        self._make_error = make_error
        self._wait = InterruptibleWait()
        self._loop = asyncio.get_running_loop()
        self._sending_since = 0.0
        self._check()

    async def run(self, sending: Awaitable[Any]) -> None:
        """Wait for one send; raises the error after the timeout."""
        self._sending_since = self._loop.time()
        await self._wait.run(sending)

    def close(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()

    def _check(self) -> None:
        waited = self._loop.time() - self._sending_since if self._wait.is_waiting else 0.0
        if waited >= self._seconds:
            self._wait.interrupt(self._make_error)
            return
        self._timer = self._loop.call_later(self._seconds - waited, self._check)
