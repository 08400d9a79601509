"""A client that stops reading is given up; one that reads slowly, or waits long for its next token, is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from starlette.requests import ClientDisconnect, Request

from pagoda.serving.http.event_stream import STALLED_READER_SECONDS, open_event_stream
from pagoda.serving.metrics.prometheus import Metrics
from tests.support.virtual_time import in_virtual_time


async def serve(seconds_per_event: float, num_events: int, seconds_per_send: float) -> tuple[list[bytes], bool]:
    """What was sent, and whether the source was closed."""
    sent: list[bytes] = []
    is_closed = False

    async def events() -> AsyncGenerator[bytes, None]:
        nonlocal is_closed
        try:
            for index in range(num_events):
                yield b"%d" % index
                await asyncio.sleep(seconds_per_event)
        finally:
            is_closed = True

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        if message.get("body"):
            await asyncio.sleep(seconds_per_send)
            sent.append(message["body"])

    request = Request({"type": "http", "path": "/", "headers": []}, receive)
    answer = await open_event_stream(request, events(), lambda report: {}, cast("Metrics", None))
    try:
        await answer({}, receive, cast("Any", send))
    except ClientDisconnect:
        assert is_closed
        raise
    return sent, is_closed


@in_virtual_time
async def test_a_reader_that_stopped_is_given_up_and_its_source_closed() -> None:
    with pytest.raises(ClientDisconnect):
        await serve(0.0, 5, seconds_per_send=1e6)


@in_virtual_time
async def test_a_slow_reader_gets_everything() -> None:
    sent, _ = await serve(0.0, 5, seconds_per_send=0.9 * STALLED_READER_SECONDS)
    assert sent == [b"0", b"1", b"2", b"3", b"4"]


@in_virtual_time
async def test_long_waits_for_the_next_token_are_not_the_readers_fault() -> None:
    sent, _ = await serve(2 * STALLED_READER_SECONDS, 3, seconds_per_send=1.0)
    assert sent == [b"0", b"1", b"2"]
