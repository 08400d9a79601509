"""A client that stops reading is given up; one that reads slowly, or waits long for its next message, is not."""

from __future__ import annotations

import asyncio

import pytest

from pagoda.serving.stalled_client import StalledClientTimeout
from tests.support.virtual_time import in_virtual_time

SECONDS = 60.0


async def send_all(num_messages: int, *, seconds_per_send: float, seconds_between: float = 0.0) -> int:
    """How many were sent."""
    watch = StalledClientTimeout(SECONDS, TimeoutError)
    try:
        for _ in range(num_messages):
            await watch.run(asyncio.sleep(seconds_per_send))
            await asyncio.sleep(seconds_between)
    finally:
        watch.close()
    return num_messages


@in_virtual_time
async def test_a_reader_that_stopped_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        await send_all(5, seconds_per_send=1e6)


@in_virtual_time
async def test_a_slow_reader_gets_everything() -> None:
    assert await send_all(5, seconds_per_send=0.9 * SECONDS) == 5


@in_virtual_time
async def test_long_waits_for_the_next_message_are_not_the_readers_fault() -> None:
    assert await send_all(3, seconds_per_send=1.0, seconds_between=2 * SECONDS) == 3
