"""Streams of events or lines whose source is closed when the client disconnects, and an HTTP status for an early error.

The status line waits for the first event, so that a refused request is a 400 or a 429 and not a broken stream. Where the
first event takes long (a full queue, a long prompt) the stream is opened with a comment, and further comments keep proxies
from closing it; an error then arrives as an event.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagoda.serving.http.chunk_writer import CHUNK_WRITER, ChunkWriter
from pagoda.serving.http.disconnect import end_tasks, wait_for_disconnect
from pagoda.serving.http.responses import report_error
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.status import ErrorReport

OPEN_AFTER_SECONDS = 10.0
COMMENT_EVERY_SECONDS = 15.0
COMMENT = b": waiting for the first token\n\n"


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How pieces are told apart. `waiting`: what keeps proxies from closing a stream that has nothing to send yet; empty where
    the form knows no comments.
    """

    media_type: str
    waiting: bytes


SERVER_SENT_EVENTS = StreamForm("text/event-stream", COMMENT)
JSON_LINES = StreamForm("application/x-ndjson", b"")
DONE = b"data: [DONE]\n\n"

Events = AsyncGenerator[bytes, None]
ErrorBody = Callable[[ErrorReport], dict[str, Any]]
ErrorEvent = Callable[[ErrorReport], bytes]


def event(content: object) -> bytes:
    """`content` (plain values) as one event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def json_line(content: object) -> bytes:
    """`content` (plain values) as one line of JSON."""
    return orjson.dumps(content) + b"\n"


def named_event(name: str, content: dict[str, Any]) -> bytes:
    """`content` as one event of that name, which its member `type` says too (Anthropic's and OpenAI's Responses)."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps({"type": name, **content}))


class EventTemplate:
    """Events of which only one string differs: the rest is encoded once. `make` gives the content that holds a string."""

    def __init__(self, make: Callable[[str], object]) -> None:
        mark = uuid.uuid4().hex
        self._before, self._after = event(make(mark)).split(orjson.dumps(mark))

    def __call__(self, text: str) -> bytes:
        """`event(make(text))`."""
        return self._before + orjson.dumps(text) + self._after


async def open_event_stream(
    request: Request,
    events: Events,
    error_body: ErrorBody | ErrorEvent,
    metrics: Metrics,
    form: StreamForm = SERVER_SENT_EVENTS,
) -> EventStream:
    """The response that streams `events`; raises what the source raises before its first event.

    `error_body` makes the last event of a stream whose source raised later, or its content.
    """
    first = asyncio.ensure_future(_first(events))
    leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((first, leaving), timeout=OPEN_AFTER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise ClientDisconnect
        if first.done():
            first.result()
    except BaseException:  # raised on: the source must be closed, or its request would go on
        await end_tasks(first, leaving)
        await events.aclose()
        del first  # its error holds this frame through its traceback, and would be held by it
        raise

    def error_event(error: Exception) -> bytes:
        made = error_body(report_error(error, metrics, request.url.path))
        return made if isinstance(made, bytes) else event(made)

    return EventStream(first, events, leaving, error_event, form)


class EventStream(Response):
    """The response of `open_event_stream`."""

    def __init__(
        self,
        first: asyncio.Future[bytes],
        events: Events,
        leaving: asyncio.Future[None],
        error_event: Callable[[Exception], bytes],
        form: StreamForm,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=form.media_type)
        self._waiting = form.waiting
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._leaving = leaving
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the source ends or the client disconnects; the source is closed either way."""
        sending = asyncio.ensure_future(self._send_all(send, scope.get(CHUNK_WRITER)))
        try:
            await asyncio.wait((sending, self._leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await end_tasks(sending, self._leaving, self._first)
            await self._events.aclose()
            del sending, self._first  # their errors hold this frame through their tracebacks

    async def _send_all(self, send: Send, writer: ChunkWriter | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def send_piece(body: bytes) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": True})

        while not self._first.done():
            if self._waiting:
                await send_piece(self._waiting)
            await asyncio.wait((self._first,), timeout=COMMENT_EVERY_SECONDS)
        try:
            await send_piece(await self._first)
            async for piece in self._events:
                if writer is None or not writer.write_chunk(piece):
                    await send_piece(piece)
        except ClientDisconnect:
            raise
        except Exception as error:  # the status line is sent: any error becomes the last event
            await send_piece(self._error_event(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _first(events: Events) -> bytes:
    async for piece in events:
        return piece
    return b""
