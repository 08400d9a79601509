"""Waiting for what another thread, task or process brings about. A bound ends a hang; it is no statement about speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 120.0
LOOK_SECONDS = 0.01


def wait_until(condition: Callable[[], T], what: str = "", *, seconds: float = SECONDS) -> T:
    """The first true value of `condition`; fails after `seconds`. `what`: what is waited for, where the call does not say."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, _failure(what, seconds)
        time.sleep(LOOK_SECONDS)
    return value


async def wait_until_async(condition: Callable[[], T], what: str = "", *, seconds: float = SECONDS) -> T:
    """The same, where the event loop has to run for the condition to come true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, _failure(what, seconds)
        await asyncio.sleep(LOOK_SECONDS)
    return value


def _failure(what: str, seconds: float) -> str:
    return f"{what or 'the condition'} did not come true within {seconds:g} s"
