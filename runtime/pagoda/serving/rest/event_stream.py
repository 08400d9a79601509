"""Server-sent events whose source ends when the client leaves, and whose client sees an HTTP status for an early error.

The status line waits for the first event, so that a refused request is a 400 or a 429 and not a broken stream. Where the
first event takes long (a full queue, a long prompt) the stream is opened with a comment, and further comments keep proxies
from closing it; an error then arrives as an event.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagoda.observability.metrics import Metrics
from pagoda.serving.bounded_wait import BoundedWait
from pagoda.serving.chunk_writer import CHUNK_WRITER, ChunkWriter
from pagoda.serving.rest.disconnect import end_tasks, wait_for_disconnect
from pagoda.serving.rest.responses import note_error
from pagoda.serving.status import ErrorReport

OPEN_AFTER_SECONDS = 10.0
COMMENT_EVERY_SECONDS = 15.0
STALLED_READER_SECONDS = 60.0
COMMENT = b": waiting for the first token\n\n"
DONE = b"data: [DONE]\n\n"

Events = AsyncGenerator[bytes, None]
ErrorBody = Callable[[ErrorReport], dict[str, Any]]


def event(content: object) -> bytes:
    """`content` (plain values) as one event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventTemplate:
    """Events of which only one string differs: the rest is encoded once. `make` gives the content that holds a string."""

    def __init__(self, make: Callable[[str], object]) -> None:
        mark = uuid.uuid4().hex
        self._before, self._after = event(make(mark)).split(orjson.dumps(mark))

    def __call__(self, text: str) -> bytes:
        """`event(make(text))`."""
        return self._before + orjson.dumps(text) + self._after


async def open_event_stream(request: Request, events: Events, error_body: ErrorBody, metrics: Metrics) -> EventStream:
    """The answer that streams `events`; raises what the source raises before its first event.

    `error_body` makes the last event of a stream whose source raised later.
    """
    first = asyncio.ensure_future(_first(events))
    leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((first, leaving), timeout=OPEN_AFTER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise ClientDisconnect
        if first.done():
            first.result()
    except BaseException:
        await end_tasks(first, leaving)
        await events.aclose()
        raise

    def error_event(error: Exception) -> bytes:
        return event(error_body(note_error(error, metrics, request.url.path)))

    return EventStream(first, events, leaving, error_event)


class EventStream(Response):
    """The answer of `open_event_stream`. A client that reads nothing for `STALLED_READER_SECONDS` is given up."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: asyncio.Future[bytes],
        events: Events,
        leaving: asyncio.Future[None],
        error_event: Callable[[Exception], bytes],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._leaving = leaving
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the source ends or the client leaves; the source is closed either way."""
        sending = asyncio.ensure_future(self._send_all(send, scope.get(CHUNK_WRITER)))
        try:
            await asyncio.wait((sending, self._leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await end_tasks(sending, self._leaving, self._first)
            await self._events.aclose()

    async def _send_all(self, send: Send, writer: ChunkWriter | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        reader = _Reader(send)
        try:
            while not self._first.done():
                await reader.send(COMMENT)
                await asyncio.wait((self._first,), timeout=COMMENT_EVERY_SECONDS)
            try:
                await reader.send(await self._first)
                async for piece in self._events:
                    if writer is None or not writer.write(piece):
                        await reader.send(piece)
            except ClientDisconnect:
                raise
            except Exception as error:
                await reader.send(self._error_event(error))
        finally:
            reader.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Reader:
    """The client at the other end. One timer for the whole stream looks whether it still reads."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._wait = BoundedWait()
        self._clock = asyncio.get_running_loop().time
        self._sending_since = 0.0
        self._look()

    async def send(self, body: bytes) -> None:
        """Send one piece; raises `ClientDisconnect` once the client has read nothing for `STALLED_READER_SECONDS`."""
        self._sending_since = self._clock()
        await self._wait.run(self._send({"type": "http.response.body", "body": body, "more_body": True}))

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        waited = self._clock() - self._sending_since if self._wait.is_waiting else 0.0
        if waited >= STALLED_READER_SECONDS:
            self._wait.interrupt(ClientDisconnect())
            return
        self._timer = asyncio.get_running_loop().call_later(STALLED_READER_SECONDS - waited, self._look)


async def _first(events: Events) -> bytes:
    async for piece in events:
        return piece
    return b""
