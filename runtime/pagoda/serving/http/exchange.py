"""One request and its response, as the ASGI application receives and sends them."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from pagoda.logs import ACCESS_LOGGER
from pagoda.serving.http.chunk_writer import CHUNK_WRITER
from pagoda.serving.http.head import Header, RequestHead
from pagoda.serving.http.responses import JSON, error_body

logger = logging.getLogger(__name__)
access_logger = logging.getLogger(ACCESS_LOGGER)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
INTERNAL_ERROR = "an internal error ended this request; see the server log"

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_STATUSES_WITHOUT_BODY = frozenset({204, 304})


class Channel(Protocol):
    """What an exchange asks of its connection."""

    client: tuple[str, int]
    server: tuple[str, int] | None
    scheme: str

    @property
    def peer(self) -> str:
        """The client, for logs."""

    @property
    def date_header(self) -> bytes:
        """The line of a response's head."""

    @property
    def is_closing_soon(self) -> bool:
        """Whether responses close the connection."""

    @property
    def is_writable(self) -> bool:
        """Whether a write takes no wait."""

    async def drain(self) -> None:
        """Wait until the client has read what was written."""

    def write(self, data: bytes) -> None:
        """Send `data`."""

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Send an error and close the connection."""

    def abort(self) -> None:
        """Cut the connection."""

    def body_was_taken(self) -> None:
        """The application has the body as far as it has arrived."""

    def response_is_complete(self, exchange: Exchange) -> None:
        """Go on with the next request, or end the connection."""


class Exchange:
    """A request whose head has arrived. Its `connection` feeds it the body, and writes what it sends.

    The response's head is written together with the first piece of its body.
    """

    def __init__(self, connection: Channel, request: RequestHead, *, has_body: bool) -> None:
        self._connection = connection
        self.request = request
        self._pieces: list[bytes] = []
        self._arrival = asyncio.Event()
        self._is_received = not has_body
        self._is_delivered = False
        self._is_disconnected = False
        self._must_continue = request.expects_continue and has_body
        self._head: bytes | None = None  # of the response, until it is written
        self._has_started = False
        self._has_no_body = False
        self._is_chunked = False
        self._remaining: int | None = None  # bytes of the response's body that its Content-Length still announces
        self.keeps_alive = request.keeps_alive
        self.is_complete = False
        """Whether the response is written."""

    @property
    def num_buffered(self) -> int:
        """Bytes of the body that the application has not asked for yet."""
        return sum(map(len, self._pieces))

    @property
    def is_received(self) -> bool:
        """Whether all of the request's body has arrived."""
        return self._is_received

    # ---- what the connection brings

    def feed(self, body: bytes, *, is_last: bool) -> None:
        """A piece of the request's body; one for a response that is complete is dropped."""
        self._is_received = is_last
        if not self.is_complete:
            if body:
                self._pieces.append(body)
            self._arrival.set()

    def disconnect(self) -> None:
        """The connection is lost, or about to be: the application is told, and what it still sends is dropped."""
        self._is_disconnected = True
        self._arrival.set()

    # ---- what the application calls

    async def run(self, app: ASGIApp) -> None:
        """The response of `app`; an error that it raises, or no response, is a 500 or a connection that is cut."""
        try:
            await app(self._scope(), self._receive, self._send)
        except Exception:  # any: it is logged and answered with a 500, and the server goes on
            logger.exception("the application failed")
        if not self.is_complete and not self._is_disconnected:
            if self._has_started:
                self._connection.abort()
            else:
                self.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR)

    def write_chunk(self, piece: bytes) -> bool:
        """See `ChunkWriter`."""
        if not self._is_chunked or not self._has_started or not self._connection.is_writable:
            return False
        self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Respond with an error in the application's place, if it has not begun to, and close the connection."""
        self._is_disconnected = True
        self._arrival.set()
        if self._has_started:
            self._connection.abort()
            return
        self._has_started = self.is_complete = True
        self._log(status)
        self._connection.refuse(status, message)

    async def _receive(self) -> Message:
        connection = self._connection
        if self._must_continue and not self._has_started:
            self._must_continue = False
            connection.write(CONTINUE)
        while not self._is_disconnected and not self.is_complete:
            if self._pieces or (self._is_received and not self._is_delivered):
                body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
                self._pieces.clear()
                self._is_delivered = self._is_received
                connection.body_was_taken()
                return {"type": "http.request", "body": body, "more_body": not self._is_received}
            self._arrival.clear()
            await self._arrival.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        connection = self._connection
        if not connection.is_writable:
            await connection.drain()
        if self._is_disconnected:
            return
        if self.is_complete:
            raise RuntimeError(f"{message['type']} was sent after the response was complete")
        if message["type"] == "http.response.start":
            if self._head is not None or self._has_started:
                raise RuntimeError("the response was started twice")
            self._head = self._encode_head(message["status"], list(message.get("headers", ())))
            self._log(message["status"])
        elif message["type"] == "http.response.body":
            self._write_body(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} is not known")

    def _write_body(self, body: bytes, *, is_last: bool) -> None:
        if self._head is None and not self._has_started:
            raise RuntimeError("the response's body was sent before its start")
        if self._has_no_body:
            body = b""
        elif self._remaining is not None:
            self._remaining -= len(body)
            if self._remaining < 0 or (is_last and self._remaining):
                raise RuntimeError("the response's body and its Content-Length differ")
        elif self._is_chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if is_last:
                body += b"0\r\n\r\n"
        if self._head is not None:
            body = self._head + body
            self._head = None
            self._has_started = True
        if body:
            self._connection.write(body)
        if is_last:
            self.is_complete = True
            self._arrival.set()
            self._connection.response_is_complete(self)

    def _encode_head(self, status: int, headers: list[Header]) -> bytes:
        request = self.request
        self.keeps_alive = self.keeps_alive and self._is_received and not self._connection.is_closing_soon
        has_length = has_connection = False
        for name, value in headers:
            if name == b"content-length":
                has_length = True
                self._remaining = int(value)
            elif name == b"connection":
                has_connection = True
                self.keeps_alive = self.keeps_alive and value.lower() != b"close"
        self._has_no_body = request.method == "HEAD" or status in _STATUSES_WITHOUT_BODY
        if not has_length and not self._has_no_body:
            if request.version == "1.0":
                self.keeps_alive = False  # the end of the connection is the end of the body
            else:
                self._is_chunked = True
                headers.append((b"transfer-encoding", b"chunked"))
        if not has_connection:
            if not self.keeps_alive:
                headers.append((b"connection", b"close"))
            elif request.version == "1.0":
                headers.append((b"connection", b"keep-alive"))
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or b"\0" in lines:
            raise RuntimeError("a header of the response has a line break or a NUL in it")
        return b"%b%b%b\r\n" % (_STATUS_LINES[status], self._connection.date_header, lines)

    def _scope(self) -> Scope:
        request, connection = self.request, self._connection
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.version,
            "method": request.method,
            "scheme": connection.scheme,
            "path": request.path,
            "raw_path": request.raw_path,
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": connection.client,
            "server": connection.server,
            CHUNK_WRITER: self,
        }
        return scope

    def _log(self, status: int) -> None:
        if access_logger.isEnabledFor(logging.INFO):
            request = self.request
            target = request.raw_path + b"?" + request.query if request.query else request.raw_path
            access_logger.info(
                '%s - "%s %s HTTP/%s" %d',
                self._connection.peer,
                request.method,
                target.decode("ascii", "replace"),
                request.version,
                status,
            )


def encode_refusal(status: HTTPStatus, message: str, date_header: bytes) -> bytes:
    """The whole response to a request that no application has seen, or that one will not respond to any more."""
    body = error_body(message)
    return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
        _STATUS_LINES[status],
        date_header,
        JSON.encode(),
        len(body),
        body,
    )
