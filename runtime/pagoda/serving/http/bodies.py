"""Request bodies: read within a limit, decompressed within the same limit, parsed as JSON whatever the Content-Type says.

tritonclient.http sends JSON without a Content-Type, so the header is not consulted.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from starlette.requests import Request

from pagoda.errors import InvalidRequestError, RequestTooLargeError

T = TypeVar("T")

# 32 + 15: either a gzip or a zlib header, with the largest window.
GZIP_OR_ZLIB_WINDOW_BITS = 47
ENCODINGS = {"gzip", "x-gzip", "deflate"}
THREAD_ABOVE_BYTES = 2**20
"""A larger body is decoded by a thread, so that the event loop's streams go on.

Decompression releases the GIL, and the checks of what was parsed can be interrupted. The one call of orjson cannot: it is
milliseconds for a MiB of text, and more for a MiB of numbers.
"""


async def decode_body(request: Request, limit: int, decode: Callable[[bytes], T]) -> T:
    """`decode` of the decompressed body, in a thread where that may take long.

    Neither the body nor what it decompresses to is ever held beyond `limit` bytes. Raises what `decode` raises,
    `RequestTooLargeError` as soon as the limit is passed, `InvalidRequestError` for what cannot be decompressed, and
    starlette's `ClientDisconnect` when the client leaves.
    """
    body = await _read(request, limit)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return decode(body) if len(body) <= THREAD_ABOVE_BYTES else await asyncio.to_thread(decode, body)
    if encoding not in ENCODINGS:
        raise InvalidRequestError(f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}")
    # A small body may decompress to a large one.
    return await asyncio.to_thread(lambda: decode(_decompress(body, limit)))


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is.

    NaN, infinity, lone surrogates, invalid UTF-8 and nesting beyond about a thousand levels are not JSON here either.
    """
    if not body:
        raise InvalidRequestError("the body is empty; a JSON object is needed")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got a {type(value).__name__}")
    return value


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _decompress(body: bytes, limit: int) -> bytes:
    decompressor = zlib.decompressobj(GZIP_OR_ZLIB_WINDOW_BITS)
    try:
        decompressed = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body cannot be decompressed: {error}") from None
    if len(decompressed) > limit:
        raise _too_large(limit)
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequestError("the body cannot be decompressed: it is cut short, or something follows it")
    return decompressed


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than the {limit} bytes allowed (max_body_bytes)")
