"""Request bodies: read within a limit, decompressed within the same limit, parsed as JSON whatever the Content-Type says.

tritonclient.http sends JSON without a Content-Type, so the header is not consulted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from starlette.requests import Request

from pagoda.config.sizes import exact_bytes
from pagoda.errors import InvalidRequestError, RequestTooLargeError
from pagoda.serving import json_decoding
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.json_decoding import LARGE_BYTES, NO_LIMITS, JsonLimits
from pagoda.serving.request_memory import Reservation

T = TypeVar("T")

# 32 + 15: either a gzip or a zlib header, with the largest window.
GZIP_OR_ZLIB_WINDOW_BITS = 47
ENCODINGS = {"gzip", "x-gzip", "deflate"}
MAX_COMPRESSION_RATIO = 100
"""JSON becomes a fifth, one prompt in many variants a fiftieth; deflate could make a thousandth of zeros."""
ANY_RATIO_BYTES = 2**20
"""What a body may become whatever its ratio."""
_PIECE = 2**17


async def decode_body(
    request: Request, limit: int, threads: DecodingThreads, decode: Callable[[bytes | bytearray], T]
) -> T:
    """`decode` of the decompressed body, in a thread where that may take long.

    Neither the body nor what it decompresses to is ever held beyond `limit` bytes. Raises what `decode` raises,
    `RequestTooLargeError` as soon as the limit is passed, `QueueFullError` where too much is being received (at once, if the
    body's length was declared), `InvalidRequestError` for what cannot be decompressed, and starlette's `ClientDisconnect` when
    the client leaves.
    """
    reservation = threads.memory.reserve(0)
    try:
        body = await _read(request, limit, reservation)
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return await threads.run(len(body), lambda: decode(body))
        if encoding not in ENCODINGS:
            raise InvalidRequestError(f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}")
        # A small body may decompress to a large one.
        return await threads.run(LARGE_BYTES + 1, lambda: decode(decompress(body, limit, _too_large(limit))))
    finally:
        reservation.release()


def parse_object(body: bytes | bytearray | memoryview, limits: JsonLimits = NO_LIMITS) -> dict[str, Any]:
    """The JSON object that `body` is; raises what `json_decoding.loads` does, but `InvalidRequestError` for what is no JSON.

    NaN, infinity, lone surrogates, invalid UTF-8 and nesting beyond about a thousand levels are not JSON here either.
    """
    if not body:
        raise InvalidRequestError("the body is empty; a JSON object is needed")
    try:
        value = json_decoding.loads(body, limits)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got a {type(value).__name__}")
    return value


async def _read(request: Request, limit: int, reservation: Reservation) -> bytes | bytearray:
    length = request.headers.get("content-length", "")
    declared = int(length) if length.isdigit() else 0
    if declared > limit:
        raise _too_large(limit)
    reservation.grow(declared)
    body: bytes | bytearray = b""
    async for piece in request.stream():
        if len(body) + len(piece) > limit:
            raise _too_large(limit)
        if not declared:
            reservation.grow(len(piece))
        if not body:
            body = piece
        elif isinstance(body, bytearray):
            body += piece
        else:
            body = bytearray(body) + piece
    return body


def decompress(body: bytes | bytearray, limit: int, too_large: RequestTooLargeError) -> bytearray:
    """`body` decompressed, piece by piece, so that nothing is made beyond `limit` bytes: `too_large` is raised then."""
    decompressor = zlib.decompressobj(GZIP_OR_ZLIB_WINDOW_BITS)
    decompressed = bytearray()
    ratio_limit = max(ANY_RATIO_BYTES, MAX_COMPRESSION_RATIO * len(body))
    start = 0
    try:
        while start < len(body) and not decompressor.eof:
            rest: bytes | bytearray = body[start : start + _PIECE]
            start += len(rest)
            is_cut = True
            while is_cut:
                made = decompressor.decompress(rest, _PIECE)
                rest = decompressor.unconsumed_tail
                is_cut = not decompressor.eof and (bool(rest) or len(made) == _PIECE)
                decompressed += made
                if len(decompressed) > limit:
                    raise too_large
                if len(decompressed) > ratio_limit:
                    raise RequestTooLargeError(
                        f"the body becomes more than {MAX_COMPRESSION_RATIO} times as large when it is decompressed, and "
                        f"larger than {exact_bytes(ANY_RATIO_BYTES)}; compress it less, or not at all"
                    )
    except zlib.error as error:
        raise InvalidRequestError(f"the body cannot be decompressed: {error}") from None
    if not decompressor.eof or decompressor.unused_data or start < len(body):
        raise InvalidRequestError("the body cannot be decompressed: it is cut short, or something follows it")
    return decompressed


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than the {exact_bytes(limit)} allowed (max_body_bytes)")
