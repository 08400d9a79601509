"""The two framings of a request's body (RFC 9112, 6 and 7): so many bytes, or chunks. Bytes in, bytes of the body out."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Protocol

from pagoda.config.sizes import exact_bytes
from pagoda.serving.http.head import CRLF, RequestError

MAX_CHUNK_OVERHEAD_BYTES = 16 * 1024
"""Of chunk extensions and needlessly long sizes, beyond what the chunks themselves allow for."""
CHUNK_OVERHEAD_ALLOWED = 16

_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;%b)?" % _TEXT)
_TRAILER = re.compile(rb"[!#$%%&'*+\-.^_`|~0-9A-Za-z]+:%b" % _TEXT)
_SMALL_SIZES = {b"%x" % size: size for size in range(1, 256)}


class RequestBody(Protocol):
    """A body that is being received."""

    @property
    def is_complete(self) -> bool:
        """Whether all of it was received; `rest` is then what came behind it."""

    @property
    def rest(self) -> bytes:
        """The beginning of the next request."""

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`, which follows what was fed before; raises `RequestError`."""


class SizedBody:
    """A body of `content_length` bytes."""

    rest = b""

    def __init__(self, content_length: int) -> None:
        self._remaining = content_length

    @property
    def is_complete(self) -> bool:
        return self._remaining == 0

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._remaining:
            data, self.rest = data[: self._remaining], data[self._remaining :]
        self._remaining -= len(data)
        return data


class ChunkedBody:
    """A body in chunks. Extensions are skipped, trailers are checked and dropped, and what both may take is bounded."""

    rest = b""

    def __init__(self, max_trailer_bytes: int) -> None:
        self.is_complete = False
        self._max_trailer_bytes = max_trailer_bytes
        self._line = bytearray()  # its beginning, while its end has not come
        self._remaining = 0  # bytes of the current chunk
        self._ends_chunk = False  # the next line is the empty one behind a chunk's bytes
        self._is_in_trailers = False
        self._overhead = 0
        self._num_trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        if self._line:
            num_known = len(self._line)
            self._line += data
            line_end = self._line.find(CRLF, num_known - 1)
            if line_end < 0:
                self._check_unfinished(num_known - 1)
                return b""
            line, data = bytes(self._line[:line_end]), bytes(self._line[line_end + len(CRLF) :])
            self._line.clear()
            self._take_line(line)
        pieces: list[bytes] = []
        position, end = 0, len(data)
        while position < end and not self.is_complete:
            if self._remaining:
                piece = data[position : position + self._remaining]
                pieces.append(piece)
                position += len(piece)
                self._remaining -= len(piece)
                if self._remaining:
                    break
                if data.startswith(CRLF, position):
                    position += len(CRLF)
                else:
                    self._ends_chunk = True
                continue
            line_end = data.find(CRLF, position)
            if line_end < 0:
                self._line += data[position:]
                self._check_unfinished(0)
                break
            self._take_line(data[position:line_end])
            position = line_end + len(CRLF)
        if self.is_complete:
            self.rest = data[position:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        # A body may consist of tiny chunks; the sizes of those are looked up.
        size = None if self._ends_chunk or self._is_in_trailers else _SMALL_SIZES.get(line)
        if size is not None:
            self._remaining = size
            return
        if self._ends_chunk:
            if line:
                raise _invalid("a chunk is longer than its size")
            self._ends_chunk = False
        elif self._is_in_trailers:
            self._num_trailer_bytes += len(line) + len(CRLF)
            if not line:
                self.is_complete = True
            elif not _TRAILER.fullmatch(line):
                raise _invalid("a trailer is not valid")
            self._check_trailers(self._num_trailer_bytes)
        else:
            match = _CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise _invalid("the size of a chunk is not a hexadecimal number")
            self._remaining = int(match[1], 16)
            self._is_in_trailers = self._remaining == 0
            # As in Go's net/http: a short line comes free with each chunk, more of it with a longer one.
            allowed = CHUNK_OVERHEAD_ALLOWED + 2 * self._remaining
            self._overhead = max(0, self._overhead + len(line) + len(CRLF) - allowed)
            self._check_overhead(self._overhead)

    def _check_unfinished(self, start: int) -> None:
        """Refuse a line without an end that can only become wrong; all before `start` was checked already."""
        line = self._line
        if line.find(b"\n", start) >= 0 or line.find(b"\r", start, -1) >= 0 or (self._ends_chunk and line != b"\r"):
            raise _invalid("a line does not end in CRLF")
        if self._is_in_trailers:
            self._check_trailers(self._num_trailer_bytes + len(line))
        elif not self._ends_chunk:
            self._check_overhead(self._overhead + len(line))

    def _check_trailers(self, num_bytes: int) -> None:
        if num_bytes > self._max_trailer_bytes:
            raise RequestError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"the request's trailers are larger than {exact_bytes(self._max_trailer_bytes)} (max_header_bytes)",
            )

    def _check_overhead(self, num_bytes: int) -> None:
        if num_bytes > MAX_CHUNK_OVERHEAD_BYTES:
            raise _invalid("chunks have too long extensions")


def _invalid(what: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, f"the request's chunked body is not valid: {what}")
