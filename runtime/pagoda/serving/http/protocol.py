"""One connection of the REST port: HTTP/1.1 (RFC 9112), one request at a time.

    waiting ──first byte──▶ head ──▶ body ──▶ response ──keep alive──▶ waiting
       │                     │        │          │
       │ keep_alive_timeout  │ 408    │ 408      │ nothing is read for send_timeout: aborted
       ▼                     ▼        ▼          ▼
     closed ◀──────────────lingering: what still comes is dropped, until the client closes or the time is up

What comes behind a request waits, bounded, until its response is complete. All deadlines are looked at by `Connections.watch`;
a response that is being made has none, so a stream may be silent for as long as it likes.
"""

from __future__ import annotations

import asyncio
import logging
from enum import Enum, auto
from http import HTTPStatus

from starlette.types import ASGIApp

from pagoda.config.sizes import exact_bytes
from pagoda.serving.http.connections import SLOWEST_BODY_BYTES_PER_SECOND, Connections, PortConnection
from pagoda.serving.http.exchange import Exchange, encode_refusal
from pagoda.serving.http.head import CRLF, HEAD_END, RequestError, check_beginning, parse_head
from pagoda.serving.http.request_body import ChunkedBody, RequestBody, SizedBody

logger = logging.getLogger(__name__)

READ_AHEAD_BYTES = 64 * 1024
"""Of a body, or of pipelined requests, that are received before they are asked for; then reading pauses."""
LINGER_SECONDS = 5.0


class State(Enum):
    """What the connection waits for."""

    WAITING = auto()  # the first byte of a request
    HEAD = auto()
    BODY = auto()
    RESPONSE = auto()
    LINGERING = auto()  # the end, from the client's side


class HttpProtocol(PortConnection):
    """A connection that `connections` has admitted."""

    def __init__(self, app: ASGIApp, connections: Connections, address: tuple[str, int]) -> None:
        super().__init__(address)
        self.server: tuple[str, int] | None = None
        self.scheme = "http"
        self._app = app
        self._connections = connections
        self._limits = connections.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._state = State.WAITING
        self._deadline: float | None = self._loop.time() + self._limits.header_timeout
        self._buffer = bytearray()
        self._num_scanned = 0  # bytes of the buffer in which no end of a head begins
        self._exchange: Exchange | None = None
        self._body: RequestBody | None = None  # of the exchange, while it is being received
        self._is_reading_paused = False
        self._writable: asyncio.Event | None = None  # while the client reads too slowly
        self._num_unsent = 0  # bytes that the client had not read at the last check
        self._unsent_since = 0.0

    # ---- the event loop's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection is open; its TLS handshake, if any, is done."""
        self._transport = transport
        self.server = transport.get_extra_info("sockname")[:2]
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._deadline = self._loop.time() + self._limits.keep_alive_timeout

    def data_received(self, data: bytes) -> None:
        """Bytes of a body, or of a head."""
        if self._state is State.LINGERING:
            return
        try:
            if self._body is not None:
                self._receive_body(data)
                return
            self._buffer += data
            if self._exchange is None:
                self._receive_head()
            elif len(self._buffer) > READ_AHEAD_BYTES:
                self._pause_reading()
        except RequestError as error:
            self._refuse(error)

    def eof_received(self) -> bool:
        """The client has closed: a request under way ends, and no half of a connection is kept."""
        if self._exchange is not None:
            self._exchange.disconnect()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """The application of a request under way is told."""
        self._connections.remove(self)
        self._transport = None
        if self._writable is not None:
            self._writable.set()
        if self._exchange is not None:
            self._exchange.disconnect()

    def pause_writing(self) -> None:
        """The client reads more slowly than the application sends."""
        self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        """What was written has gone out."""
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    # ---- the registry's calls

    def check(self, now: float) -> None:
        """Abort where the client reads nothing; close, with a 408 if it has begun a request, where it sends nothing."""
        if self._transport is None:
            return  # the handshake has a timeout of its own
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        elif num_unsent and now - self._unsent_since >= self._limits.send_timeout:
            logger.debug("%s has read nothing for %g s (send_timeout_seconds)", self.peer, self._limits.send_timeout)
            self.abort()
            return
        if self._deadline is None or now < self._deadline:
            return
        if self._state is State.HEAD:
            seconds = self._limits.header_timeout
            message = f"the request's head did not arrive within {seconds:g} s (header_timeout_seconds)"
            self._refuse(RequestError(HTTPStatus.REQUEST_TIMEOUT, message))
        elif self._state is State.BODY:
            self._refuse(RequestError(HTTPStatus.REQUEST_TIMEOUT, self._slow_body_message()))
        elif self._state is State.LINGERING:
            self.abort()
        else:
            self._transport.close()

    # ---- the server's calls, to end

    def end(self) -> None:
        """Close as soon as the response under way is complete; a request whose body has not arrived is refused."""
        if self._exchange is None:
            if self._transport is not None:
                self._transport.close()
            else:
                self.evict()
        elif not self._exchange.is_received:
            self._exchange.refuse(
                HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down; the request was not begun"
            )
        else:
            self._exchange.keeps_alive = False

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ---- the exchange's calls

    @property
    def date_header(self) -> bytes:
        """The line of a response's head."""
        return self._connections.date_header

    @property
    def is_closing_soon(self) -> bool:
        """Whether responses close the connection."""
        return self._connections.is_closing_soon

    @property
    def is_writable(self) -> bool:
        """Whether a write takes no wait."""
        return self._writable is None and self._transport is not None

    async def drain(self) -> None:
        """Wait until the client has read what was written."""
        if self._writable is not None:
            await self._writable.wait()

    def write(self, data: bytes) -> None:
        """Send `data`."""
        if self._transport is not None:
            self._transport.write(data)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Send an error and close the connection."""
        self.write(encode_refusal(status, message, self.date_header))
        self._linger()

    def body_was_taken(self) -> None:
        """The application has the body as far as it has arrived."""
        if self._body is not None:
            self._resume_reading()

    def response_is_complete(self, exchange: Exchange) -> None:
        """Go on with the next request, or end the connection."""
        if exchange is not self._exchange or self._transport is None:
            return
        if not exchange.keeps_alive:
            if exchange.is_received and not self._buffer:
                self._transport.close()
            else:
                self._linger()  # to close while bytes come would take the response from the client
            return
        self._exchange = None
        self._state = State.WAITING
        self._deadline = self._loop.time() + self._limits.keep_alive_timeout
        self._connections.is_waiting(self)
        self._resume_reading()
        if self._buffer:
            try:
                self._receive_head()
            except RequestError as error:
                self._refuse(error)
        if self._state is State.RESPONSE and len(self._buffer) > READ_AHEAD_BYTES:
            self._pause_reading()

    # ---- requests

    def _receive_head(self) -> None:
        """Begin the request whose head is in the buffer, if all of it is."""
        buffer, limits = self._buffer, self._limits
        while buffer.startswith(CRLF):
            del buffer[: len(CRLF)]  # RFC 9112, 2.2
        if not buffer or buffer == b"\r":
            return
        end = buffer.find(HEAD_END, self._num_scanned)
        size = len(buffer) if end < 0 else end + len(HEAD_END)
        if size > limits.max_header_bytes:
            has_target = 0 <= buffer.find(CRLF) < limits.max_header_bytes
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if has_target else HTTPStatus.REQUEST_URI_TOO_LONG
            message = f"the request's head is larger than {exact_bytes(limits.max_header_bytes)} (max_header_bytes)"
            raise RequestError(too_large, message)
        if end < 0:
            check_beginning(buffer, self._num_scanned)
            self._num_scanned = max(0, size - len(HEAD_END) + 1)
            self._connections.holds_head(self, size)
            if self._state is State.WAITING:
                self._state = State.HEAD
                self._deadline = self._loop.time() + limits.header_timeout
            return
        head = bytes(buffer[:size])
        del buffer[:size]
        self._num_scanned = 0
        request = parse_head(head, limits.max_header_count)
        self._connections.is_busy(self)
        has_body = request.content_length != 0
        self._exchange = exchange = Exchange(self, request, has_body=has_body)
        if has_body:
            length = request.content_length
            self._body = ChunkedBody(limits.max_header_bytes) if length is None else SizedBody(length)
            self._state = State.BODY
            self._deadline = self._loop.time() + limits.body_timeout
            data = bytes(buffer)
            buffer.clear()
            self._receive_body(data)
        else:
            self._state = State.RESPONSE
            self._deadline = None
        task = self._loop.create_task(exchange.run(self._app))
        self._connections.tasks.add(task)
        task.add_done_callback(self._connections.tasks.discard)

    def _receive_body(self, data: bytes) -> None:
        body, exchange = self._body, self._exchange
        assert body is not None
        assert exchange is not None
        exchange.feed(body.feed(data), is_last=body.is_complete)
        if body.is_complete:
            self._body = None
            self._buffer += body.rest
            self._state = State.RESPONSE
            self._deadline = None
            return
        assert self._deadline is not None
        # Bytes earn time, but never more than a pause may take.
        earned = self._deadline + len(data) / SLOWEST_BODY_BYTES_PER_SECOND
        self._deadline = min(self._loop.time() + self._limits.body_timeout, earned)
        if exchange.num_buffered > READ_AHEAD_BYTES:
            self._pause_reading()

    def _refuse(self, error: RequestError) -> None:
        """Refuse the request that is being received."""
        logger.info("%s: %d %s", self.peer, error.status, error)
        if self._exchange is None:
            self.refuse(error.status, str(error))
        else:
            self._exchange.refuse(error.status, str(error))

    def _slow_body_message(self) -> str:
        return (
            f"the request's body did not arrive: {self._limits.body_timeout:g} s (body_timeout_seconds) and one more for "
            f"every {SLOWEST_BODY_BYTES_PER_SECOND} bytes are allowed"
        )

    def _linger(self) -> None:
        """End our side; drop what still comes, so that the client reads the response before it sees the connection end."""
        self._state = State.LINGERING
        self._deadline = self._loop.time() + LINGER_SECONDS
        self._body = None
        self._buffer.clear()
        self._connections.is_waiting(self)
        self._resume_reading()
        transport = self._transport
        if transport is not None and transport.can_write_eof():
            transport.write_eof()

    def _pause_reading(self) -> None:
        if not self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = True
            self._transport.pause_reading()
            if self._state is State.BODY:
                self._deadline = None  # it is the application that takes its time

    def _resume_reading(self) -> None:
        if self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = False
            self._transport.resume_reading()
            if self._state is State.BODY:
                self._deadline = self._loop.time() + self._limits.body_timeout
