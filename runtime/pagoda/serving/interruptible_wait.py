"""Waits that a timer or a shutdown may interrupt, for the price of a few attribute writes each.

`asyncio.timeout` costs about as much as formatting a streamed token, and a stream would pay it for every one. An
`InterruptibleWait` is made once for a stream; its deadline's timer, or a server that stops, interrupts it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class InterruptibleWait:
    """The waits of one stream, one at a time, in whichever task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._make_error: Callable[[], Exception] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a `run` is waiting."""
        return self._task is not None

    def interrupt(self, make_error: Callable[[], Exception]) -> None:
        """End the running wait, and every later one, with an error; that of the first call.

        It is made where it is raised: an error that was kept here would form a cycle with the frames of its traceback.
        """
        if self._make_error is None:
            self._make_error = make_error
            if self._task is not None:
                self._task.cancel()

    async def run(self, awaitable: Awaitable[T]) -> T:
        """The result of `awaitable`; raises the error of an `interrupt`, cancelling it if it has begun.

        A task that is cancelled by others too stays cancelled.
        """
        if self._make_error is not None:
            _close(awaitable)
            raise self._make_error()
        task = self._task = asyncio.current_task(self._loop)
        assert task is not None
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._make_error is None or task.uncancel() > 0:
                raise
            raise self._make_error() from None
        finally:
            self._task = None
            del task  # a task that fails keeps its error, and the error this frame through its traceback


def _close(awaitable: Awaitable[Any]) -> None:
    close = getattr(awaitable, "close", None)
    if close is not None:
        close()
