"""HTTP/1.1 with what uvicorn's own httptools protocol lacks: a bound on the size of request headers, and a `ChunkWriter`."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagoda.serving.http.chunk_writer import CHUNK_WRITER, ChunkWriter

SEPARATORS_LENGTH = 4  # ": " and the line's end


def bounded_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol class for request lines and headers of at most about `max_header_bytes` together."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"max_header_bytes": max_header_bytes})


class _BoundedProtocol(HttpToolsProtocol):
    max_header_bytes: int
    _is_in_headers = False
    _is_refused = False
    _num_header_bytes = 0
    _num_received_bytes = 0  # since the request began, until its headers are complete

    def data_received(self, data: bytes) -> None:
        """Parse `data`; headers that never end are refused before they are complete."""
        super().data_received(data)
        if self._is_in_headers:
            # The parser does not report an unfinished header, so what it was given is counted.
            self._num_received_bytes += len(data)
            if self._num_received_bytes > self.max_header_bytes:
                self._refuse()

    def on_message_begin(self) -> None:
        """Start counting."""
        self._is_in_headers = True
        self._num_header_bytes = self._num_received_bytes = 0
        super().on_message_begin()
        self.scope[CHUNK_WRITER] = ChunkWriter(self.transport, self.flow)  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """Count and keep a piece of the URL."""
        self._num_header_bytes += len(url)
        if self._num_header_bytes <= self.max_header_bytes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count and keep a header."""
        self._num_header_bytes += len(name) + len(value) + SEPARATORS_LENGTH
        if self._num_header_bytes <= self.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuse headers that were too large; pass on any other."""
        self._is_in_headers = False
        if self._num_header_bytes > self.max_header_bytes:
            self._refuse()
        elif not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Drop the body of a refused request."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """No application runs for a refused request."""
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The response to what is not HTTP is JSON, like that to any other error."""
        self._send_error(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self) -> None:
        if not self._is_refused:
            self._send_error(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the request's headers are larger than the {self.max_header_bytes} bytes allowed (max_header_bytes)",
            )

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._is_refused = True
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": message})
        headers = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(headers.encode() + body)
        self.transport.close()
