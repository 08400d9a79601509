"""Time that a test controls.

Clock                    handed to what takes a clock: it stands still until the test moves it
in_virtual_time          an event loop whose clock jumps to the next timer: waiting takes no time
turn_clock_of_loop       the running loop, with threads and processes beside it: its timers come as early as the test likes
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Clock:
    """Monotonic seconds. `on_read`, where a test sets it, is called before each reading."""

    def __init__(self) -> None:
        self._now = 1000.0
        self.on_read: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        self.on_read()
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is left that could wake the loop up"
        self.now += max(0.0, timeout)
        return super().select(0)


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which may sleep for hours. It waits for nothing but timers: no thread, no other process."""
    selector = _JumpingSelector()

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now  # type: ignore[method-assign]
        return loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(work)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine, run in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_in_virtual_time(test(*args, **kwargs))

    return run


def turn_clock_of_loop(seconds: float) -> None:
    """Let `seconds` pass at once for the running event loop: timers that are due by then fire in its next turn."""
    loop = asyncio.get_running_loop()
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]
