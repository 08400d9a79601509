"""HTTP/1.1 with what uvicorn's own httptools protocol lacks: a bound on the size of a request's head, and a `ChunkWriter`."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagoda.serving.http.chunk_writer import CHUNK_WRITER, ChunkWriter

SEPARATORS_LENGTH = 4  # ": " and the line's end


def bounded_protocol(max_head_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol class for heads (request line and headers) of at most about `max_head_bytes`."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"max_head_bytes": max_head_bytes})


class _BoundedProtocol(HttpToolsProtocol):
    max_head_bytes: int
    _is_in_head = False
    _is_refused = False
    _num_head_bytes = 0
    _num_open_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse `data`; a header that never ends is refused before it is complete."""
        super().data_received(data)
        if self._is_in_head:
            # The parser keeps an unfinished header to itself, so what it was given is counted.
            self._num_open_bytes += len(data)
            if self._num_open_bytes > self.max_head_bytes:
                self._refuse()

    def on_message_begin(self) -> None:
        """Start to count."""
        self._is_in_head = True
        self._num_head_bytes = self._num_open_bytes = 0
        super().on_message_begin()
        self.scope[CHUNK_WRITER] = ChunkWriter(self.transport, self.flow)  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """Count and keep a piece of the URL."""
        self._num_head_bytes += len(url)
        if self._num_head_bytes <= self.max_head_bytes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count and keep a header."""
        self._num_head_bytes += len(name) + len(value) + SEPARATORS_LENGTH
        if self._num_head_bytes <= self.max_head_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Answer a head that was too large; pass on any other."""
        self._is_in_head = False
        if self._num_head_bytes > self.max_head_bytes:
            self._refuse()
        elif not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Drop the body of a refused request."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing starts after a refusal."""
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is answered in JSON like any other mistake."""
        self._send_error(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self) -> None:
        if not self._is_refused:
            self._send_error(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the request's head is larger than the {self.max_head_bytes} bytes allowed (max_header_bytes)",
            )

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        self._is_refused = True
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": message})
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
