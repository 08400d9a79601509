"""Large and compressed bodies are decoded beside the event loop, small ones in it."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from starlette.requests import Request

from pagoda.errors import InvalidRequestError, RequestTooLargeError
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.http.bodies import ANY_RATIO_BYTES, decode_body
from pagoda.serving.json_decoding import LARGE_BYTES
from pagoda.serving.request_memory import RequestMemory

T = TypeVar("T")
LIMIT = 4 * LARGE_BYTES


def request_of(body: bytes, **headers: str) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "path": "/", "headers": raw}, receive)


def threads() -> DecodingThreads:
    return DecodingThreads(RequestMemory(2**30))


async def decode_it(request: Request, decode: Callable[[bytes | bytearray], T]) -> T:
    return await decode_body(request, LIMIT, threads(), decode)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"x" * (LARGE_BYTES + 1), "identity"),
        (gzip.compress(b"x" * LIMIT), "gzip"),
        (gzip.compress(b"x"), "gzip"),
    ],
    ids=["large", "compressed and large", "compressed"],
)
async def test_the_event_loop_goes_on_while_a_body_is_decoded(body: bytes, encoding: str) -> None:
    """The decoder waits for the loop, which would be a deadlock if it kept the loop from running."""
    loop, has_run = asyncio.get_running_loop(), threading.Event()

    def decode(content: bytes) -> int:
        loop.call_soon_threadsafe(has_run.set)
        assert has_run.wait(10), "the event loop stands still"
        return len(content)

    size = len(gzip.decompress(body)) if encoding == "gzip" else len(body)
    assert await decode_it(request_of(body, content_encoding=encoding), decode) == size


async def test_a_small_body_is_decoded_without_a_thread() -> None:
    thread = await decode_it(request_of(b"x" * LARGE_BYTES), lambda content: threading.get_ident())
    assert thread == threading.get_ident()


async def test_errors_and_limits_are_those_of_a_small_body() -> None:
    def refuse(content: bytes) -> None:
        raise InvalidRequestError(f"{len(content)} bytes")

    with pytest.raises(InvalidRequestError, match=f"^{2 * LARGE_BYTES} bytes$"):
        await decode_it(request_of(b"x" * 2 * LARGE_BYTES), refuse)
    with pytest.raises(RequestTooLargeError):
        await decode_it(request_of(b"x" * (LIMIT + 1)), refuse)
    with pytest.raises(RequestTooLargeError):
        await decode_it(request_of(gzip.compress(b"x" * (LIMIT + 1)), content_encoding="gzip"), refuse)


async def test_a_compressed_body_may_not_become_anything() -> None:
    zeros = gzip.compress(b" " * 2 * ANY_RATIO_BYTES)
    with pytest.raises(RequestTooLargeError, match="100 times as large"):
        await decode_body(request_of(zeros, content_encoding="gzip"), 2**24, threads(), len)
    words = gzip.compress(" ".join(map(str, range(300_000))).encode())
    assert await decode_body(request_of(words, content_encoding="gzip"), 2**24, threads(), len) > ANY_RATIO_BYTES
