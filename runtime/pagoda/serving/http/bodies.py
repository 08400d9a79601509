"""Request bodies: read within a limit, unpacked within the same limit, parsed as JSON whatever the Content-Type says.

tritonclient.http sends JSON without a Content-Type, so the header is not consulted.
"""

from __future__ import annotations

import zlib
from typing import Any

import orjson
from starlette.requests import Request

from pagoda.errors import InvalidRequestError, RequestTooLargeError

# 32 + 15: either a gzip or a zlib header, with the largest window.
GZIP_OR_ZLIB_WINDOW_BITS = 47
ENCODINGS = {"gzip", "x-gzip", "deflate"}


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, unpacked. Never holds more than `limit` bytes (and as many unpacked ones).

    Raises `RequestTooLargeError` as soon as the limit is passed, `InvalidRequestError` for what cannot be unpacked, and
    starlette's `ClientDisconnect` when the client leaves.
    """
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
    body = b"".join(pieces)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ENCODINGS:
        raise InvalidRequestError(f"Content-Encoding must be gzip, deflate or identity, got {encoding[:40]!r}")
    return _unpack(body, limit)


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


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object in the body of `request`."""
    return parse_object(await read_body(request, limit))


def _unpack(body: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj(GZIP_OR_ZLIB_WINDOW_BITS)
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body cannot be unpacked: {error}") from None
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidRequestError("the body cannot be unpacked: it is cut short, or something follows it")
    return unpacked


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is larger than the {limit} bytes allowed (max_body_bytes)")
